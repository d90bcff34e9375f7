"""Losses of a network that began as AR: predictions read at the token before, as it made them
(adapt.label=next), and its own loss on the clean half of the same pass (adapt.ar_loss)."""

from dataclasses import replace

import torch
from torch import Tensor

from models.document_ids import begins
from models.masks import BlockDiffusion

from .loss import LossInputs


def with_rows_before(inputs: LossInputs, block_size: int) -> LossInputs:
    """Each token read at the one before: in its block of its noised version; the first of a block
    at the clean token before it. loss_positions of `inputs` are the places of the tokens [B, L], or
    [B, 2, L] of two views; the first of a row must not be among them. Without a clean half there is
    one block. block_size: where rows do not differ in it."""
    places, length = inputs.loss_positions, inputs.loss_mask.shape[1]
    at, view = places % length, places // length % inputs.views
    row = places // (inputs.views * length)
    per_row = inputs.tokens.shape[1]
    size = block_size if inputs.block_sizes is None else inputs.block_sizes[row]
    part = torch.where(at % size == 0, per_row // length - 1, view)
    return replace(inputs, loss_positions=row * per_row + part * length + at - 1, places=places)


def with_ar_loss(
    inputs: LossInputs, x0: Tensor, document_ids: Tensor | None, factor: float
) -> LossInputs:
    """With the cross-entropy of each token of x0 [B, L] that counts, predicted at the clean token
    before it, `factor` times. A text's first token has none before it. A row that predicts the same
    token for both losses is one. document_ids [B, L]: of x0."""
    inputs = _answered_whole(inputs, x0)
    length, per_row = x0.shape[1], inputs.tokens.shape[1]
    scored = (inputs.loss_mask > 0) & ~begins(x0, document_ids)
    row, at = scored.nonzero().unbind(1)
    clean = (row + 1) * per_row - length + at - 1
    diffusion = inputs.loss_positions

    def spread(values: Tensor, elsewhere: float) -> Tensor:
        """Of the rows that diffusion reads -> of all rows of the network's output."""
        return values.new_full((inputs.outputs,), elsewhere).index_copy_(0, diffusion, values)

    targets = spread(inputs.targets, 0)
    targets[clean] = x0[row, at]
    ar_weights = torch.zeros(inputs.outputs, device=x0.device)
    ar_weights[clean] = 1.0
    used = ar_weights > 0
    used[diffusion] = True
    found = used.nonzero()[:, 0]  # each row once, in ascending order
    nowhere = inputs.views * x0.numel()
    return replace(
        inputs,
        loss_positions=found,
        targets=targets[found],
        weights=spread(inputs.weights, 0.0)[found],
        places=spread(inputs.predicted, nowhere)[found],
        ar_weights=ar_weights[found],
        ar_loss=factor,
    )


def _answered_whole(inputs: LossInputs, x0: Tensor) -> LossInputs:
    """The same where the network answers for the clean half too; where there was none, with one."""
    length, per_row = x0.shape[1], inputs.tokens.shape[1]
    if per_row == length:  # one block, of which nobody sees the clean half
        twice = {
            name: torch.cat([value] * 2, 1)
            for name in ("document_ids", "positions")
            if (value := getattr(inputs, name)) is not None
        }
        mask = BlockDiffusion(length, causal=True)
        inputs = replace(
            inputs, tokens=torch.cat([inputs.tokens, x0], 1), attention_mask=mask, **twice
        )
        moved = inputs.loss_positions // length * 2 * length + inputs.loss_positions % length
    elif inputs.attention_mask.both:
        return inputs
    else:
        noised = inputs.attention_mask.noised(per_row)
        moved = inputs.loss_positions // noised * per_row + inputs.loss_positions % noised
    mask = replace(inputs.attention_mask, both=True)
    return replace(inputs, attention_mask=mask, loss_positions=moved, places=inputs.predicted)
