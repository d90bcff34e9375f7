"""What the command lines of the scripts share."""

import argparse
import sys
from collections.abc import Callable, Sequence

from utils import CIRCUMSTANCES, reason, shown


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        super().error(shown(message))


def new_parser(doc: str) -> argparse.ArgumentParser:
    """Its --help shows the docstring of the script as it stands; its errors have no control
    characters."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parsed(
    options: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings of main.py that stand behind --. argv None: of the process."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    end = words.index("--") if "--" in words else len(words)
    return options.parse_args(words[:end]), words[end + 1 :]


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return number


def chosen_device(name: str | None):
    """torch's device of this name; None: the accelerator, or the CPU where there is none."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(name or found or "cpu")


def answered(name: str, work: Callable[[], int | None]) -> int:
    """The exit code of a script: of `work` (None: 0), or 2 after one line about what it was given
    and cannot use."""
    try:
        return work() or 0
    except (ValueError, FloatingPointError, *CIRCUMSTANCES) as error:
        print(f"{name}: {shown(reason(error))}", file=sys.stderr)
        return 2
