"""Several sampling runs in one start, into one file: one after the other, with a line for each."""

from dataclasses import dataclass

from sampling.run import SamplingRun, tell_cache
from utils import say

# column of the table: its key in a report, and how it is written
FIGURES = {
    "gen. PPL": ("gen_ppl", ",.2f"),
    "entropy": ("gen_entropy", ".3f"),
    "length": ("gen_lengths", ",.1f"),
    "NFE": ("gen_nfes", ",.1f"),
    "tokens/NFE": ("tokens_per_evaluation", ".2f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "run": ("run", ""),
}
WIDTH = 12  # of a figure


@dataclass(frozen=True)
class Sweep:
    """runs: {what is said of it: run}, all of one file. They go on where they were, each with the
    rows that an own command of its settings would write."""

    runs: dict[str, SamplingRun]

    def run(self) -> None:
        """What is missing of each. A process waits for no other: the one that adds the last row of
        a run prints its line, the one that ends the last run prints all of them."""
        tell_cache([*self.runs.values()])
        say(self._line("point", list(FIGURES)))
        for number, (text, run) in enumerate(self.runs.items(), 1):
            say(f"point {number} of {len(self.runs)}: {text}")
            if (report := run.complete()) is not None:
                print(self._line(text, _figures(report)), flush=True)
        file = next(iter(self.runs.values())).output.file
        reports = file.reports()
        found = [
            self._line(text, _figures(reports[run.output.run]))
            for text, run in self.runs.items()
            if reports.get(run.output.run, {}).get("rows") == run.texts.count
        ]
        if len(found) < len(self.runs):
            return  # another process is still writing
        print("", self._line("point", list(FIGURES)), *found, sep="\n")
        print(f"texts: {file.path}; report: {file.summary}", flush=True)

    def _line(self, text: str, figures: list[str]) -> str:
        width = max(map(len, ["point", *self.runs]))
        return "  ".join([text.ljust(width), *(each.rjust(WIDTH) for each in figures)])


def _figures(report: dict) -> list[str]:
    return [
        "–" if report[key] is None else format(report[key], form) for key, form in FIGURES.values()
    ]
