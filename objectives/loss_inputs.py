"""What a batch asks the network, and the loss of the answer.

A question is made where the batch lies, on the host: which tokens are hidden is drawn there, so the
number of rows to be read is known and nothing is asked back from the device.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.masks import Rule

from .head import LossKernel, cross_entropy_kernel, head_loss
from .loss import TokenLoss, scattered


@dataclass(frozen=True)
class Question:
    """`read`: which rows of the network's answer, flattened, are about a token that counts; None:
    all. M is their number; the loss is sum(weights * nats) / sum(counted)."""

    tokens: Tensor  # int64 [B, T], what the network sees
    rule: Rule
    counted: Tensor  # float32 [B, L], see TokenLoss
    read: Tensor | None  # int64 [M]
    targets: Tensor  # int64 [M]
    weights: Tensor  # float32 [M]
    sigma: Tensor | None = None  # [B], the noise level where the network is told
    expm1: Tensor | None = None  # [B], e^sigma - 1 where the loss needs it
    segments: Tensor | None = None  # int64 [B, T]
    positions: Tensor | None = None  # int64 [B, T]

    def tensors(self) -> dict[str, Tensor]:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, pinned: bool = True) -> "Question":
        """On the device; by way of pinned memory without waiting for it."""
        if self.tokens.device == device:
            return self
        pinned = pinned and device.type != "cpu" and self.tokens.device.type == "cpu"

        def sent(x: Tensor) -> Tensor:
            # a part of a tensor would be copied on the way, to memory that is not pinned
            return (x.contiguous().pin_memory() if pinned else x).to(device, non_blocking=pinned)

        return replace(self, **{name: sent(x) for name, x in self.tensors().items()})

    def padded(self, rows: int) -> "Question":
        """With as many rows read (at most all); the answer at those added does not count."""
        if self.read is None or len(self.read) >= rows:
            return self
        free = torch.ones(self.counted.numel(), dtype=torch.bool, device=self.read.device)
        free[self.read] = False
        more = free.nonzero()[: rows - len(self.read), 0]
        # their target is that of a row that counts: never the mask, whose probability is 0
        target = self.targets[:1] if len(self.targets) else self.targets.new_zeros(1)
        return replace(
            self,
            read=torch.cat([self.read, more]),
            targets=torch.cat([self.targets, target.expand(len(more))]),
            weights=torch.cat([self.weights, self.weights.new_zeros(len(more))]),
        )


class Objective:
    """`question` of a batch, where the objective has draws also `question_at` of a corruption, and
    `kernel`, the loss on the logits: the rest follows."""

    def kernel(self, backbone) -> LossKernel:
        return cross_entropy_kernel(backbone, self.mask_id)

    def answer(self, backbone, question: Question) -> TokenLoss:
        return answer(backbone, question, self.kernel(backbone))

    def loss(self, backbone, *batch, **settings) -> TokenLoss:
        """The answer to `question`."""
        return self.answer(backbone, self.question(*batch, **settings))

    def loss_at(self, backbone, *corrupted, **settings) -> TokenLoss:
        """The answer to `question_at`."""
        return self.answer(backbone, self.question_at(*corrupted, **settings))


def answer(backbone, question: Question, kernel: LossKernel) -> TokenLoss:
    """The loss of the network's answer."""
    q = question
    hidden = backbone.hidden(
        q.tokens,
        q.sigma,
        rule=q.rule,
        positions=q.positions,
        segments=q.segments,
        read=q.read,
    )
    row = None if q.expm1 is None else q.read // q.tokens.shape[1]
    head = head_loss(
        backbone,
        hidden.flatten(0, -2),
        q.targets,
        q.weights / q.counted.sum(),
        kernel,
        *(() if q.expm1 is None else (q.expm1[row],)),
        sigma=q.sigma,
        row=row,
    )
    nats = head.nats * q.weights
    nats = nats.view_as(q.counted) if q.read is None else scattered(nats, q.read, q.counted)
    return TokenLoss(nats=nats, counted=q.counted, mean=head.total)
