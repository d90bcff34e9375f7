"""Several texts in one row: segments [B, L] number them; padding is a segment like any other.

Within a segment everything is as in a row of its own: attention (models/attention.py), positions
from 0 on, and a first token with nothing before it.
"""

import torch
from torch import Tensor


def begins(tokens: Tensor, segments: Tensor | None) -> Tensor:
    """Where a text begins, boolean [B, L]: the first column, with segments the first of each."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[:, 0] = True
    if segments is not None:
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return first


def positions(segments: Tensor) -> Tensor:
    """The place of each token in its text, int64 [B, L], for rotary positions."""
    index = torch.arange(segments.shape[1], device=segments.device)
    return index - (index * begins(segments, segments)).cummax(1).values
