"""What the estimators ask, asked of a network: the clean half of a batch once, then one pass over
the noised half for each question, and of the head only the rows that are read."""

import torch
from torch import Tensor

from evaluation.estimators import Ask
from models.adaptation import PLAIN, Adaptation
from models.clean_half import clean_half
from models.document_ids import positions
from models.layers import wide_dtype
from models.masks import Full
from models.network import products, products_dtype
from objectives.head import CHUNK_LOGITS, CHUNK_LOGITS_ACCELERATOR


def asker(
    backbone,
    x0: Tensor,
    *,
    block_size: int,
    mask_id: int,
    document_ids: Tensor | None = None,
    adapt: Adaptation = PLAIN,
) -> Ask:
    """`ask` for noised versions of x0 int64 [B, L]. With one block nobody reads the clean half: it
    is not made. Under no_grad or inference_mode. Where `adapt` is shifted, the first token of a
    text cannot be asked about."""
    asked = {"attention_mask": Full(), "document_ids": document_ids}
    if document_ids is not None:
        asked["positions"] = positions(document_ids)
    ends = None
    if block_size < x0.shape[1]:
        dtype = products_dtype(backbone.embeddings)
        half = clean_half(backbone, x0, block_size, dtype, document_ids, adapt)
        ends = half.ends
        asked = {"attention_mask": half.attention_mask, "cache": half}

    def ask(x_t: Tensor, read: Tensor, reduce) -> Tensor:
        at = (read - 1).clamp(min=0) if adapt.shifted else read
        hidden = backbone.hidden(x_t, read=at, **asked)  # [M, E]
        if ends is not None:  # the token before a block is not noised with it
            first = (read % block_size == 0)[:, None]
            hidden = torch.where(first, ends[read // block_size - 1], hidden)
        return reduced(backbone, hidden, read, mask_id, reduce)

    return ask


def reduced(backbone, hidden: Tensor, read: Tensor, mask_id: int, reduce) -> Tensor:
    """`reduce` of the log-probabilities of hidden [M, E], joined; float32 at least, the mask's
    -inf. They are made a few at a time, and in float32 all in the same memory."""
    size, weight, bias = rows_at_once(backbone), backbone.head_weight, backbone.head_bias
    half = products_dtype(weight).itemsize == 2
    memory = None if half else weight.new_empty(min(size, len(hidden)), len(weight))
    answers = []
    for states, rows in zip(hidden.split(size), read.split(size), strict=True):
        if half:
            logits, wide = backbone.logits(states), None
        else:
            logits = wide = memory[: len(states)]
            products(backbone.features(states).to(memory.dtype), weight, bias, out=logits)
        logits[:, mask_id] = -torch.inf
        dtype = wide_dtype(logits)
        answers.append(reduce(torch.log_softmax(logits, -1, dtype=dtype, out=wide), rows))
    return torch.cat(answers)


def rows_at_once(backbone) -> int:
    """Rows whose logits fit into what the training's head holds at once."""
    on_cpu = backbone.embeddings.device.type == "cpu"
    logits = CHUNK_LOGITS if on_cpu else CHUNK_LOGITS_ACCELERATOR
    return max(1, logits // backbone.vocab_size)
