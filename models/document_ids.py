"""Several texts in one row: document_ids [B, L] number them; padding is a document like any other.
Within a document everything is as in a row of its own: attention, positions from 0 on, a first
token with nothing before it."""

import torch
from torch import Tensor


def begins(tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """Where a text begins, boolean [B, L]: the first column, or each document's first."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[:, 0] = True
    if document_ids is not None:
        first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return first


def positions(document_ids: Tensor) -> Tensor:
    """The place of each token in its text, int64 [B, L], for rotary positions."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index - (index * begins(document_ids, document_ids)).cummax(1).values
