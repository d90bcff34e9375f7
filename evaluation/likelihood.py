"""Likelihood metrics: nats per token, bits per dimension, perplexity, with the error of the
estimate.

Tokens of one row are not independent (they share context and, in diffusion, noise levels), rows
are. So the standard error is that of a ratio estimator over rows: nll = sum_r s_r / sum_r c_r with
s_r the nll of row r, summed over its c_r tokens. Where s_r is a mean of draws, a part of that error
is the noise of the draws; how much is told by how the draws of one row differ.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """nll in nats per token; bpd in bits per token; the errors are one standard error, nan where it
    cannot be told: nll_error of one row, draw_error of one draw. nll_error holds draw_error."""

    nll: float
    nll_error: float
    tokens: int
    rows: int
    draw_error: float = 0.0
    # of a validation by counts: nats per masked token where a block had up to 1 / P, 2 / P ... of
    # its tokens masked, None where no block had
    by_share: tuple[float | None, ...] = ()

    @property
    def bpd(self) -> float:
        return self.nll / math.log(2)

    @property
    def ppl(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def ppl_error(self) -> float:
        return self.ppl * self.nll_error

    def __str__(self) -> str:
        drawn = f", of which the draws {self.ppl * self.draw_error:.3f}" * (self.draw_error > 0)
        return (
            f"perplexity {self.ppl:.3f} ± {self.ppl_error:.3f}{drawn}"
            f" ({self.nll:.4f} nats, {self.bpd:.4f} bits per token; {self.tokens:,} tokens of"
            f" {self.rows:,} rows)"
        )


class LikelihoodMeter:
    """Sums over batches, in float64 on the device of the batches; nothing waits for the device
    until `compute`."""

    def __init__(self):
        self.sums: Tensor | None = None  # float64 [6]: s, c, s^2, s c, c^2, rows

    def update(self, nll: Tensor, loss_mask: Tensor) -> None:
        """nll, loss_mask [B, L]; nll is already 0 outside the mask. Rows without a token in it are
        left out."""
        self.add(nll.double().sum(1), loss_mask.double().sum(1))

    def add(self, s: Tensor, c: Tensor) -> None:
        """Sums of rows, float64 [B] each."""
        sums = torch.stack([x.sum() for x in (s, c, s * s, s * c, c * c, c > 0)])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self, sums: Tensor | None = None) -> Likelihood:
        """The figures so far; `sums` replaces this process's own by those of all processes."""
        sums = self.sums if sums is None else sums
        if sums is None or sums[1] == 0:
            raise ValueError("no token to evaluate: the validation split is empty or all padding")
        s, c, ss, sc, cc, rows = sums.tolist()
        nll = s / c
        if rows < 2:
            return Likelihood(nll, math.nan, int(c), int(rows))
        residual = max(ss - 2 * nll * sc + nll * nll * cc, 0.0) * rows / (rows - 1)
        return Likelihood(nll, math.sqrt(residual) / c, int(c), int(rows))


def of_rows(nll: Tensor, tokens: Tensor, sampled: bool) -> Likelihood:
    """nll float64 [R, K]: of each row in each of K draws, summed over its tokens [R]."""
    meter = LikelihoodMeter()
    meter.add(nll.mean(1), tokens.double())
    found = meter.compute()
    return replace(found, draw_error=draw_error(nll) / found.tokens if sampled else 0.0)


def draw_error(nll: Tensor) -> float:
    """The standard error that the draws alone give to the sum over rows of the mean over draws, of
    nll [R, K]: nan for one draw."""
    draws = nll.shape[1]
    if draws < 2:
        return math.nan
    spread = (nll - nll.mean(1, keepdim=True)).square().sum(1) / (draws - 1)
    return math.sqrt(float(spread.sum()) / draws)


@dataclass
class RowResults:
    """What is known of the rows of an evaluation, for one likelihood: {row: (tokens, nll of each
    draw, summed over them)}, and the seconds it took."""

    sampled: bool
    rows: dict[int, tuple[int, list[float]]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, rows: list[int], tokens: list[int], nll: list[list[float]]) -> None:
        self.rows |= dict(zip(rows, zip(tokens, nll, strict=True), strict=True))

    def likelihood(self, rows: Collection[int] | None = None) -> Likelihood:
        """Of these rows, or of all; in their order, so that the same rows give the same number to
        the last bit whoever measured them."""
        found = [self.rows[row] for row in sorted(self.rows if rows is None else rows)]
        if not any(tokens for tokens, _ in found):
            raise ValueError("no token to evaluate: the validation split is empty or all padding")
        tokens, nll = zip(*found, strict=True)
        return of_rows(torch.tensor(nll).double(), torch.tensor(tokens), self.sampled)
