"""The settings of a run: load() composes them, check() says what is wrong with them.

    config = load(["algo=bamdlm", "block_size=4"])
    problems, warnings = check(config)

Types and meanings are in schema.py, values in configs/*.yaml; a test holds the two together.
Nothing here imports torch or lightning unless the machine has a GPU: a wrong command line is
answered at once.
"""

from settings.compose import build, compose_values, composed_yaml
from settings.defaults import (
    CHOSEN,
    differences,
    fill,
    local_folder,
    newest_checkpoint,
    run_dir,
    shaping,
    with_run_folder,
    write_settings,
)
from settings.overrides import parse
from settings.rules import check
from settings.schema import Checkpointing, Config

__all__ = [
    "Checkpointing",
    "Config",
    "ConfigError",
    "check",
    "composed_yaml",
    "differences",
    "examine",
    "load",
    "local_folder",
    "newest_checkpoint",
    "run_dir",
    "shaping",
    "write_settings",
]


class ConfigError(ValueError):
    """A run that cannot start; .problems holds one sentence for each reason."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(["this run cannot start:", *(f"  - {p}" for p in problems)]))


def _assemble(overrides: list[str]) -> tuple[Config | None, list[str], list[str]]:
    """The Config (None where it cannot be made), the problems of composing, and notes."""
    values, problems, notes = compose_values(overrides, CHOSEN)
    if values is None:
        return None, problems, notes
    values = fill(values)
    config = build(values)
    folder = run_dir(config)
    config = build(with_run_folder(values, folder))
    if (
        config.mode in ("ppl_eval", "sample_eval")
        and config.eval.checkpoint_path is None
        and config.algo.backbone == "dit"
    ):
        config.eval.checkpoint_path = newest_checkpoint(config)
        if config.eval.checkpoint_path is not None:
            notes.append(f"eval.checkpoint_path is not set: taking {config.eval.checkpoint_path}")
    return config, problems, notes


def load(overrides: list[str]) -> Config:
    """The settings of a command line, every null filled in; ConfigError for what cannot be read.

    Whether the settings fit together is for check() to say.
    """
    config, problems, _ = _assemble(overrides)
    if problems:
        raise ConfigError(problems)
    return config


def examine(overrides: list[str]) -> tuple[Config | None, list[str], list[str]]:
    """load() and check() in one: (config, all problems, all warnings). Never raises ConfigError."""
    config, problems, notes = _assemble(overrides)
    if config is None:
        return None, problems, notes
    more, warnings = check(config, {key for key, _ in parse(overrides)[0].values})
    return config, problems + more, notes + warnings
