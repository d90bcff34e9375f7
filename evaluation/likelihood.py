"""Likelihood metrics: nats per token, bits per dimension, perplexity, with the error of the
estimate.

Tokens of one row are not independent (they share context and, in diffusion, noise levels), rows
are. So the standard error is that of a ratio estimator over rows: nll = sum_r s_r / sum_r c_r with
s_r the nats and c_r the tokens of row r.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LN2 = math.log(2)


@dataclass(frozen=True)
class Likelihood:
    """nll in nats per token; bpd in bits per token; the errors are one standard error, nan for one
    row."""

    nll: float
    nll_error: float
    tokens: int
    rows: int

    @property
    def bpd(self) -> float:
        return self.nll / LN2

    @property
    def ppl(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def ppl_error(self) -> float:
        return self.ppl * self.nll_error

    def __str__(self) -> str:
        return (
            f"perplexity {self.ppl:.3f} ± {self.ppl_error:.3f}"
            f" ({self.nll:.4f} nats, {self.bpd:.4f} bits per token; {self.tokens:,} tokens)"
        )


class LikelihoodMeter:
    """Sums over batches, in float64 on the device of the batches; nothing waits for the device
    until `compute`."""

    def __init__(self):
        self.sums: Tensor | None = None  # float64 [6]: s, c, s^2, s c, c^2, rows

    def update(self, nll: Tensor, loss_mask: Tensor) -> None:
        """nll, loss_mask [B, L]; nll is already 0 outside the mask. Rows without a token in it are
        left out."""
        s, c = nll.double().sum(1), loss_mask.double().sum(1)
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
