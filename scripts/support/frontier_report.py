"""What scripts/frontier.py found, as tables and a picture."""

import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from evaluation.quality import Figure
from modes import tables
from scripts.support.picture import picture
from utils import atomic_file, write_json

COLUMNS = (
    *("model", "algo", "block_size", "steps", "numbers", "temperature", "nucleus_p", "nfe"),
    *("gen_ppl", "gen_ppl_error", "entropy", "entropy_error", "length", "texts"),
    *("distinct_1", "distinct_2", "distinct_3", "distinct_4", "repetition", "ended_by_eos"),
    *("tokens_per_evaluation", "tokens_per_second", "seconds", "run"),
)
FORMS = {"temperature": "g", "nfe": ",.1f", "tokens_per_evaluation": ".2f", "seconds": ",.1f"}
MARKERS = "osD^vPX*<>hp"
REAL = "real text"


def short(path: str) -> str:
    """A name for a checkpoint: the folder of its run."""
    parts = [part for part in Path(path).parts if part not in ("checkpoints", "last.ckpt", "/")]
    return parts[-1] if parts else path


def matched(rows: list[dict]) -> Iterator[str]:
    """The generative perplexity of each curve where its entropy is that of real text, by a straight
    line between two temperatures in log perplexity; the error is that of these two points."""
    real = next((r for r in rows if r["model"] == REAL), None)
    for name, curve in curves(rows).items() if real else ():
        target = real["entropy"]
        curve = sorted(curve, key=lambda r: r["entropy"])
        for a, b in itertools.pairwise(curve):
            if a["entropy"] <= target <= b["entropy"] and a["entropy"] < b["entropy"]:
                at = between(a, b, target)
                yield f"{' '.join(name)}: generative perplexity {at} at the entropy of real text"


def between(a: dict, b: dict, entropy: float) -> Figure:
    width = b["entropy"] - a["entropy"]
    share = (entropy - a["entropy"]) / width
    slope = math.log(b["gen_ppl"] / a["gen_ppl"]) / width
    value = a["gen_ppl"] * math.exp(slope * (entropy - a["entropy"]))
    variance = 0.0
    for point, weight in ((a, 1 - share), (b, share)):
        errors = (point["gen_ppl_error"] or math.nan) / point["gen_ppl"]
        errors = math.hypot(errors, slope * (point["entropy_error"] or math.nan))
        variance += (weight * errors) ** 2
    return Figure(value, value * math.sqrt(variance))


def curves(rows: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """The points that differ in temperature alone."""
    found = {}
    for each in rows:
        if each["model"] != REAL and each["gen_ppl"] is not None:
            name = each["model"], each["steps"], each["numbers"]
            found.setdefault(tuple(filter(None, name)), []).append(each)
    return found


def as_text(rows: list[dict]) -> str:
    lines = [["model", "steps", "", "T", "NFE", "gen. PPL", "entropy", "tokens/NFE", "seconds"]]
    for each in rows:
        figures = [
            "–" if each[x] is None else Figure(each[x], each[f"{x}_error"] or math.nan)
            for x in ("gen_ppl", "entropy")
        ]
        others = ["" if each[x] is None else format(each[x], form) for x, form in FORMS.items()]
        said = [each[name] or "" for name in ("model", "steps", "numbers")]
        lines.append([*said, *others[:2], *figures, *others[2:]])
    return tables.text(lines)


def write(out: Path, rows: list[dict], args) -> None:
    """The table so far."""
    with atomic_file(out / "frontier.csv") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_json(out / "frontier.json", {"judge": args.judge, "seed": args.seed, "points": rows})


def draw(rows: list[dict], target: Path, judge: str) -> None:
    """A line for each curve: a colour for a model, a marker for a rule, its size for the NFE."""
    found = curves(rows)
    models = list(dict.fromkeys(name[0] for name in found))
    steps = list(dict.fromkeys(curve[0]["steps"] for curve in found.values()))
    marker = {rule: MARKERS[i % len(MARKERS)] for i, rule in enumerate(steps)}
    with picture(target, 8.5, 5.5) as axes:
        for name, curve in found.items():
            color = f"C{models.index(name[0]) % 10}"
            draw_curve(axes, curve, color, marker[curve[0]["steps"]])
        keys = [{"color": f"C{i % 10}", "label": name} for i, name in enumerate(models)]
        grey = {"color": "0.4", "linestyle": ""}
        keys += [{**grey, "marker": marker[rule], "label": rule} for rule in steps]
        evaluations = sorted({round(r["nfe"]) for curve in found.values() for r in curve})
        shown_sizes = evaluations[:1] + evaluations[len(evaluations) // 2 :][:1] + evaluations[-1:]
        keys += [
            {**grey, "marker": "o", "markersize": marker_size(n), "label": f"{n:,} NFE"}
            for n in dict.fromkeys(shown_sizes)
        ]
        for each in rows:
            if each["model"] == REAL:
                axes.plot(each["entropy"], each["gen_ppl"], "k*", markersize=14)
                axes.axvline(each["entropy"], color="k", linewidth=0.5, linestyle=":")
                keys.append({"color": "k", "marker": "*", "linestyle": "", "label": REAL})
        axes.set(yscale="log", xlabel="entropy of a text in nats")
        axes.set_ylabel(f"generative perplexity (judge: {short(judge)})")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())  # else its labels lie over the others
        axes.grid(True, alpha=0.2)
        handles = [Line2D([], [], **key) for key in keys]
        axes.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw_curve(axes, curve: list[dict], color: str, marker: str) -> None:
    curve = sorted(curve, key=lambda r: r["temperature"])
    axes.errorbar(
        *([r[x] for r in curve] for x in ("entropy", "gen_ppl")),
        *([r[x] or 0 for r in curve] for x in ("gen_ppl_error", "entropy_error")),
        color=color,
        marker=marker,
        markersize=marker_size(sum(r["nfe"] for r in curve) / len(curve)),
        linewidth=0.7,
        elinewidth=0.7,
        alpha=0.75,
    )


def marker_size(nfe: float) -> float:
    return 1 + 1.2 * math.log2(1 + nfe)
