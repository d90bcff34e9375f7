"""How a benchmark with targets ends."""

import json


def conclude(figures: dict, missed, *, check: bool) -> int:
    """Says what was missed and prints the figures as the last line. Gives the exit code: 1 where
    something was missed and `check` is set."""
    figures["missed"] = list(missed)
    for text in figures["missed"]:
        print("missed:", text)
    print(json.dumps(figures))
    return 1 if check and figures["missed"] else 0
