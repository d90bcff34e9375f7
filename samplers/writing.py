"""Writing text with a denoiser: one entry, `generate`, for the four algorithms.

A sampler knows no model class, no configuration and no tokenizer: it asks a callable

    denoise(tokens [B, T], read [B, R], cache=None) -> log-probabilities [B, R, V]

(the mask token at -inf) and for SEDD `score(tokens [B, L], sigma [B]) -> log-score [B, L, V]`.

Every random number is a function of (seed, row, try, position, draw) alone, so but for rounding of
the network a row's text depends neither on its batch nor on the device count.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .analytic import one_round as analytic_round
from .autoregressive import one_round as ar_round
from .draw import DRAWS
from .params import SamplingParams
from .request import Sample, TextRequest
from .rounds import block_span, one_round, window_span
from .steps import CONFIDENCES, STEPS
from .texts import ActiveTexts


@dataclass(frozen=True)
class Sampler:
    """`one_round` brings all texts one round further and returns how many tokens it wrote. `can`:
    steps (it follows the rules of STEPS), cache (sampling.kv_cache gives the same texts), infill
    (it fills the gaps of a prompt), corrector (it fills tokens of a finished block once more).
    `ends_anywhere`: a text may stop inside a round."""

    one_round: Callable[[ActiveTexts], int]
    can: tuple[str, ...] = ()
    ends_anywhere: bool = False


SAMPLERS = {
    "bamdlm": Sampler(
        partial(one_round, span=block_span), can=("steps", "cache", "infill", "corrector")
    ),
    "mdlm": Sampler(partial(one_round, span=window_span), can=("steps", "infill")),
    "sedd": Sampler(analytic_round, can=()),
    "ar": Sampler(ar_round, can=("cache",), ends_anywhere=True),
}


def generate(
    algo: str,
    denoise: Callable,
    requests: Iterable[TextRequest],
    params: SamplingParams,
    *,
    device: torch.device | str = "cpu",
    watch: Callable | None = None,
    tick: Callable[[int, int], None] = lambda tokens, evaluations: None,
) -> Iterator[list[Sample]]:
    """Yields finished samples, those that end together in one list, in no fixed order of rows.

    `requests` is drawn from as places in the batch become free. `watch(Frame)` is called after
    every evaluation with the texts so far (copied to the host: for looking, not for speed);
    `tick(tokens, evaluations)` after every round with how many more were made. FloatingPointError:
    the network answered NaN.
    """
    algo = {"bd3lm": "bamdlm"}.get(algo, algo)
    check(params, algo)
    return _rounds(SAMPLERS[algo], tick, denoise, iter(requests), params, device, watch)


def _rounds(sampler: Sampler, tick: Callable, *arguments) -> Iterator[list[Sample]]:
    texts = ActiveTexts(*arguments)
    while len(texts):
        before = texts.canvas.evaluations
        try:
            tokens = sampler.one_round(texts)
        except ValueError:  # a step rule that compares with NaN
            texts.canvas.check()
            raise
        tick(tokens, texts.canvas.evaluations - before)
        yield texts.settle(every=sampler.ends_anywhere)


def check(params: SamplingParams, algo: str, infill: bool = False) -> None:
    """ValueError with a sentence for each value that cannot be."""
    if algo not in SAMPLERS:
        raise ValueError(f"algo must be one of {sorted(SAMPLERS)}, got {algo!r}")
    problems = [
        f"sampling.{name}={getattr(params, name)!r} must be one of {sorted(table)}"
        for name, table in (("steps", STEPS), ("confidence", CONFIDENCES), ("dtype", DRAWS))
        if getattr(params, name) not in table
    ]
    reads = STEPS[params.steps].reads if params.steps in STEPS else ()
    problems += params.problems(algo, SAMPLERS[algo].can, reads, infill)
    if problems:
        raise ValueError("; ".join(problems))
