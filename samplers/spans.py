"""What is visible while a token is filled: the block of bamdlm, the window of mdlm.

Each function takes a masked position and the SamplingParams and returns (start, stop).
"""

from .params import SamplingParams


def block_span(position: int, params: SamplingParams) -> tuple[int, int]:
    """BAM-DLM: blocks from left to right, each filled given the clean blocks before it
    (arXiv:2503.09573).

    A block sees itself and the tokens before it, `context_size` in all. Infilling fills the gaps of
    a block given what is to its left and its own visible tokens; what lies further right is not
    seen.
    """
    stop = (position // params.block_size + 1) * params.block_size
    return max(0, stop - params.context_size), stop


def window_span(position: int, params: SamplingParams) -> tuple[int, int]:
    """MDLM: a window is filled whole, then moves by half its length, given what it still sees
    (arXiv:2406.07524).

    The last window is moved less where that is enough, so that the text gets exactly the length
    asked for. Tokens given anywhere inside a window are seen from both sides.
    """
    width = min(params.window, params.length)
    stride = max(1, width // 2)
    moves = max(0, -(-(position + 1 - width) // stride))
    stop = min(moves * stride + width, params.length)
    return stop - width, stop
