"""Draw the perplexity of a training run, step by step, from its metrics.csv.

    python scripts/plot_run.py outputs/quickstart
    python scripts/plot_run.py outputs/quickstart curve.png

Without a second argument the picture is curve.png in the folder. compare.py draws several runs.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modes.results import LOG
from scripts.support.command import new_parser
from scripts.support.picture import picture
from training.log_reading import read_log
from utils import reason, shown

SMOOTHING = 0.02  # of the run: what the training loss is averaged over


def smoothed(steps: list[int], values: list[float]) -> list[float]:
    """Exponential moving average over SMOOTHING of the steps, without the bias of its start."""
    width = SMOOTHING * steps[-1]
    out, total, weight, before = [], 0.0, 0.0, steps[0]
    for step, value in zip(steps, values, strict=True):
        kept = math.exp((before - step) / width)
        total, weight, before = kept * total + value, kept * weight + 1, step
        out.append(total / weight)
    return out


def losses(log: dict[str, dict[int, float]]) -> dict[int, float]:
    """{step: finite training loss} of a log; step 0 has none."""
    logged = log.get("trainer/loss", {}).items()
    return {step: value for step, value in sorted(logged) if math.isfinite(value) and step > 0}


def perplexities(nats: list[float]) -> list[float]:
    return [math.exp(min(x, 30)) for x in nats]


def finish(axes, unit: str, title: str = "") -> None:
    axes.set(yscale="log", xlabel=unit, ylabel="perplexity", title=title)
    axes.grid(True, which="both", alpha=0.2)


def plot(folder: Path, target: Path) -> Path:
    """Perplexity per step, from the folder's metrics.csv."""
    log = folder / LOG
    if not log.is_file():
        raise ValueError(f"{log} does not exist: give the folder of a training run (outputs/…/…)")
    series = read_log(log)
    loss = losses(series)
    if not loss:
        raise ValueError(
            f"{log} holds no trainer/loss yet; train for trainer.log_every_n_steps steps"
        )
    steps, nats = list(loss), list(loss.values())
    smooth = perplexities(smoothed(steps, nats))
    with picture(target, 8, 4.5) as axes:
        axes.plot(steps, perplexities(nats), color="tab:blue", alpha=0.2, lw=0.8)
        axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
        if valid := series.get("val/ppl"):
            label = f"validation (last {valid[max(valid)]:.1f})"
            axes.plot([*valid], [*valid.values()], "o-", color="tab:red", label=label)
        finish(axes, "optimizer steps", folder.name)
        axes.legend()
    return target


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, help="run folder, outputs/<data>/<name>-<hash>")
    parser.add_argument("out", type=Path, nargs="?", help="PNG to write")
    arguments = parser.parse_args()
    try:
        print(plot(arguments.folder, arguments.out or arguments.folder / "curve.png"))
    except ValueError as error:
        print(shown(error), file=sys.stderr)
        return 2
    except OSError as error:
        print(shown(reason(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
