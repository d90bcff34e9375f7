"""Draw and tabulate the learning check of docs/results.md from what its runs left behind.

    python scripts/support/plot_results.py [FOLDER] [OUT.png]

FOLDER (docs/results) holds NAME.csv, the run's metrics.csv, and NAME.ppl.json, the result of its
mode=ppl_eval. Prints the table and writes the curves of the validation perplexity.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.support.command import answered, new_parser
from scripts.support.picture import picture
from training.log_reading import read_log
from utils import read_json

DOCS = Path(__file__).resolve().parents[2] / "docs"
LABELS = {
    "ar": "AR",
    "bamdlm4": "BAM-DLM S = 4",
    "bamdlm16": "BAM-DLM S = 16",
    "mdlm": "MDLM",
    "sedd": "SEDD",
}


def read_runs(folder: Path) -> dict[str, tuple[dict[int, float], dict]]:
    """{run: (validation perplexity by number of steps, its ppl_eval)} of the runs in the folder."""
    runs = {}
    for name in LABELS:
        log, found = folder / f"{name}.csv", folder / f"{name}.ppl.json"
        if log.is_file() and found.is_file():
            runs[name] = (read_log(log)["val/ppl"], read_json(found))
    if not runs:
        raise ValueError(f"{folder} holds no NAME.csv with NAME.ppl.json, NAME of {list(LABELS)}")
    return runs


def table(runs: dict) -> str:
    """Markdown: validation perplexity by step, and of the last checkpoint with its error."""
    steps = sorted({step for ppl, _ in runs.values() for step in ppl})
    header = " | ".join([*(f"{step:,}" for step in steps), "last checkpoint", "nats per token"])
    lines = [f"| | {header} |", "|---" * (len(steps) + 3) + "|"]
    for name, (ppl, found) in runs.items():
        values = [f"{ppl[step]:.2f}" if step in ppl else "" for step in steps]
        values += [f"{found['ppl']:.2f} ± {found['ppl_error']:.2f}", f"{found['nll']:.4f}"]
        lines.append(f"| {LABELS[name]} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def plot(runs: dict, target: Path) -> None:
    """Validation perplexity by step, one line a run."""
    ticks = [30, 40, 50, 60, 80, 100, 140]
    with picture(target, 7.5, 4.2, dpi=100) as axes:
        for name, (ppl, found) in runs.items():
            label, error = f"{LABELS[name]}: {found['ppl']:.1f}", found["ppl_error"]
            (line,) = axes.plot([*ppl], [*ppl.values()], "o-", ms=4, label=label)
            axes.errorbar(max(ppl), found["ppl"], error, color=line.get_color(), capsize=4)
        axes.set(yscale="log", xlabel="optimizer steps", ylabel="validation perplexity")
        axes.set_yticks(ticks, map(str, ticks))
        axes.minorticks_off()
        title = "Shakespeare's held-out plays (AR exact, the others upper bounds)"
        axes.set_title(title, fontsize=10)
        axes.grid(True, alpha=0.2)
        axes.legend(fontsize=9)


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS / "results")
    parser.add_argument("out", type=Path, nargs="?", default=DOCS / "images/learning_check.png")
    arguments = parser.parse_args()
    return answered("plot_results", lambda: show(arguments.folder, arguments.out))


def show(folder: Path, out: Path) -> None:
    runs = read_runs(folder)
    print(table(runs))
    plot(runs, out)
    print(f"\n{out}")


if __name__ == "__main__":
    sys.exit(main())
