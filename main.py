"""The command line: compose and check the settings, then train, evaluate or sample.

Imports that take time come after the check, so a wrong command line is answered at once.
"""

import importlib
import logging
import os
import sys
import warnings


def main(argv: list[str]) -> int:
    from modes import cli
    from settings import ConfigError, blamed
    from utils import CIRCUMSTANCES, shown

    config = cli.configure(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # data workers do not tokenize
    from checkpointing.layouts import CheckpointError
    from data.streaming import TextError
    from training import distributed
    from training.health import BadSteps, follow_launcher
    from training.saving import SaveError

    quiet()
    if config.mode != "sample_eval":  # whose processes do not wait for each other
        follow_launcher()
    try:
        run = importlib.import_module(f"modes.{config.mode}").prepare(config)
    except (ValueError, RuntimeError, *CIRCUMSTANCES) as error:
        bug = isinstance(error, RuntimeError) and not isinstance(error, CIRCUMSTANCES)
        if bug and "memory" not in str(error):  # torch has no error of its own for little memory
            raise
        known = isinstance(error, ConfigError)
        print(error if known else ConfigError([blamed(error, config)]), file=sys.stderr)
        return 2
    try:
        run()
    except CheckpointError as error:  # of a part that is read only now
        print(ConfigError([str(error)]), file=sys.stderr)
        return 2
    except (SaveError, BadSteps, TextError) as error:
        print(shown(error), file=sys.stderr)
        return 1
    distributed.leave_group()
    return 0


def quiet() -> None:
    """Keep banners and advice of the libraries out of the way of what this project says."""
    from utils import HarmlessFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in ("httpx", "httpx2", "fsspec", "urllib3", "torch", "aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*`srun` command is available on your system but is not used.*",
        ".*flex_attention called without torch.compile.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # the meter sums over all ranks
        ".*all_gather is deprecated.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # of trainer.max_time
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    from training import signals

    signals.end_on_interrupt()
    if sys.stdout is not None:  # a terminal or a file that knows fewer characters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
