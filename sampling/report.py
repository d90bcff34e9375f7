"""What a sampling run reports: its figures over all rows, and how the samples were made."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from evaluation.judge import TextScore
from evaluation.quality import NGRAMS, mean, perplexity
from objectives.algorithms import get_algorithm
from samplers.params import SamplingParams
from samplers.steps import STEPS
from samplers.writing import SAMPLERS
from sampling.sample_file import SampleRow

RULES = {
    "nucleus": "tokens whose cumulative probability including their own is <= p, always the first",
    "low_entropy": "redrawn where 256 tokens have an entropy below 4 nats, at most 10 tries",
}
# fields of SamplingParams that say nothing of how a text was made, or have a place of their own
UNTOLD = ("bos_id", "eos_id", "seed", "batch_size", "move_chance")
NUMBERS = {  # the type of each of the others that a command line can set
    each.name: each.type
    for each in fields(SamplingParams)
    if each.type in (int, float, str) and each.name not in UNTOLD
}
SHOWN = {"num_steps": "T"}  # a field by another name: as the paper and the setting have it


def made_with(algo: str, params: SamplingParams) -> dict:
    """{name: value} of all numbers of a run: columns of the CSV, and in the report. None: this
    algorithm or step rule does not read it."""
    writes = get_algorithm(algo).writes
    can = SAMPLERS[writes].can
    reads = STEPS[params.steps].reads if "steps" in can else ()
    of_rules = {name for rule in STEPS.values() for name in rule.reads}
    read = {name: name in reads for name in of_rules} | {
        "block_size": writes == "bamdlm",
        "window": writes == "mdlm",
        "context_size": "cache" in can,
        "corrector": "corrector" in can,
    }
    if writes == "sedd":
        read["num_steps"] = True
    names = [each.name for each in fields(params) if each.name not in UNTOLD]
    made = {
        SHOWN.get(name, name): getattr(params, name) if read.get(name, True) else None
        for name in names
    }
    return made | {"steps": params.steps if "steps" in can else algo}


def read_numbers(algo: str, params: SamplingParams) -> set[str]:
    """The fields of SamplingParams that decide how a text is written."""
    made = {name for name, value in made_with(algo, params).items() if value is not None}
    return {each.name for each in fields(params) if SHOWN.get(each.name, each.name) in made}


def summarise(rows: Sequence[SampleRow], notes: Sequence[dict], about: dict) -> dict:
    """rows: all of the run. notes: what was logged when they were added (may be incomplete)."""
    tries, logged, rejected, tokens, nfes = (
        sum(note[name] for note in notes)
        for name in ("tries", "rows", "rejected", "tokens", "nfes")
    )
    seconds, ppl = _seconds(notes), perplexity([score_of(row) for row in rows])
    entropies = [row.gen_entropy for row in rows]
    found = {
        "rows": len(rows),
        "gen_ppl": ppl.value,
        "gen_ppl_error": ppl.error,
        "gen_ppl_mean": _mean([r.gen_ppl for r in rows if r.gen_ppl is not None]),
        "gen_entropy": _mean(entropies),
        "gen_entropy_error": mean(entropies).error,
        "gen_lengths": _mean([r.gen_lengths for r in rows]),
        "gen_nfes": _mean([r.gen_nfes for r in rows]),
        "tokens_per_evaluation": tokens / nfes if nfes else math.nan,
        "acceptance": (logged - rejected) / tries if tries else math.nan,
        "stopped": dict(sum((Counter(note["stopped"]) for note in notes), Counter())),
        "seconds": round(seconds, 2),
        "tokens_per_second": tokens / seconds if seconds else math.nan,
    }
    return {name: value if value == value else None for name, value in (found | about).items()}


def score_of(row: SampleRow) -> TextScore:
    """What the judge said of a row; a text of no tokens has no nats."""
    nats = None
    if row.gen_ppl is not None:
        nats = math.log(row.gen_ppl) * row.gen_lengths if row.gen_lengths else 0.0
    return TextScore(nats, row.gen_lengths, row.gen_entropy)


def _seconds(notes: Sequence[dict]) -> float:
    """Processes of one rank came one after the other, ranks worked side by side."""
    spent = {}
    for note in notes:
        name = (note["process"], note["rank"])
        spent[name] = max(spent.get(name, 0.0), note["seconds"])
    totals = Counter()
    for (_, rank), seconds in spent.items():
        totals[rank] += seconds
    return max(totals.values(), default=0.0)


def _mean(values: Sequence[float]) -> float:
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def facts(summary: dict) -> dict:
    """How the texts were made; None: it is not known, or has no meaning."""
    rule = summary["steps"]
    reads = STEPS[rule].reads if rule in STEPS else ()
    of_all_rules = {
        each.name: each.default
        for each in fields(SamplingParams)
        if each.metadata.get("if_changed") and not each.metadata.get("if_read")
    }
    changed = {
        name: summary[name]
        for name, default in of_all_rules.items()
        if summary.get(name, default) != default
    }
    return {
        "steps": rule,
        "T": summary.get("T"),
        **{name: summary.get(name) for name in reads if name != "num_steps"},
        **changed,
        "nucleus": summary["nucleus_p"],
        "precision": summary.get("precision"),
        "draws": summary["dtype"],
        "seed": summary["seed"],
        "checkpoint": summary.get("checkpoint"),
    }


def lines(summary: dict) -> list[str]:
    """The report as text."""

    def show(name, form=",.2f"):
        return "–" if summary[name] is None else format(summary[name], form)

    judge = summary.get("judge")
    over = f"tokens of {judge}" if judge else "the model's own tokens"
    texts = "text" if summary["rows"] == 1 else "texts"
    found = [
        f"{summary['rows']} {texts} of {summary['algo']}, {show('gen_nfes', ',.1f')} evaluations"
        f" each, {show('tokens_per_evaluation')} tokens per evaluation",
        f"generative perplexity {show('gen_ppl')} ± {show('gen_ppl_error')} (judge: {judge})"
        if judge
        else "no judge, so no generative perplexity",
        f"entropy {show('gen_entropy', '.3f')} ± {show('gen_entropy_error', '.3f')} nats,"
        f" length {show('gen_lengths', ',.1f')} ({over})",
    ]
    if "repetition" in summary:
        several = ", ".join(show(f"distinct_{n}", ".3f") for n in range(1, NGRAMS + 1))
        found.append(
            f"distinct-1 to -{NGRAMS} {several}, repeated {NGRAMS}-grams"
            f" {show('repetition', '.1%')}, ended by EOS {show('ended_by_eos', '.1%')}"
        )
    if summary["seconds"]:
        found.append(f"{show('tokens_per_second', ',.0f')} tokens/s, {show('seconds', ',.1f')} s")
    told = {name: value for name, value in facts(summary).items() if value is not None}
    found.append(", ".join(f"{name} {value}" for name, value in told.items()))
    if summary.get("reject_low_entropy"):
        found.append(f"acceptance {show('acceptance', '.3f')} ({RULES['low_entropy']})")
    return found
