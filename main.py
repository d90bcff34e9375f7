"""The command line: compose and check the settings, then train, evaluate or sample.

Imports that take time come after the check, so a wrong command line is answered at once.
"""

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def main(argv: list[str]) -> int:
    from modes import cli
    from settings import ConfigError, blamed
    from utils import CIRCUMSTANCES, Failure, reason, shown

    if cli.asks_for_several(argv):
        from modes import multirun

        return multirun.main(argv)
    config = cli.configure(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # data workers do not tokenize
    with imports():
        from checkpointing.restricted_pickle import CheckpointError
        from training import distributed
        from training.health import follow_launcher
        from training.signals import end_on_warning

        mode = importlib.import_module(f"modes.{config.mode}")

    quiet()
    end_on_warning()
    if config.mode != "sample_eval":  # whose processes do not wait for each other
        follow_launcher()
    try:
        run = mode.prepare(config)
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
    except (Failure, OSError, MemoryError, FloatingPointError) as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    distributed.leave_group()
    return 0


@contextmanager
def imports() -> Iterator[None]:
    """Those that take time make a million objects that stay. To look for garbage among them, again
    and again, took a third of the time until the first step; from here on they are left out."""
    first = gc.isenabled() and "lightning" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


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
        ".*is not supported by the model summary.*",  # bf16-mixed; ours shows no megabytes
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


def command(argv: list[str]) -> int:
    """main(), where what it prints may not arrive: then 1, or 2 where the output was all there was
    to do. No process that it started outlives it."""
    from modes.cli import take_output
    from training.signals import Stopped
    from utils import end_children

    raw, streams = zip(*(take_output(descriptor) for descriptor in (1, 2)), strict=True)
    sys.stdout, sys.stderr = streams
    trouble = 1
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code or 0
        trouble = 1 if isinstance(ended, Stopped) else 2
    finally:
        end_children()
    for stream in streams:
        stream.flush()
    return code or (trouble if any(output.failure for output in raw) else 0)


if __name__ == "__main__":
    from training import signals

    signals.end_on_interrupt()
    sys.exit(command(sys.argv[1:]))
