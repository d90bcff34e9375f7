"""BAM-DLM: blocks from left to right, each filled given the clean blocks before it
(arXiv:2503.09573).

A block sees itself and the tokens before it, `context_size` in all. Infilling fills the gaps of a
block given what is to its left and its own visible tokens; what lies further right is not seen.
"""

from .rounds import generate_rounds


def span(position: int, params) -> tuple[int, int]:
    stop = (position // params.block_size + 1) * params.block_size
    return max(0, stop - params.context_size), stop


def generate_blockwise(denoise, requests, params, *, device, watch, tick):
    return generate_rounds(span, denoise, requests, params, device=device, watch=watch, tick=tick)
