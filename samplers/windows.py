"""MDLM: a window is filled whole, then moves by half its length, given what it still sees
(arXiv:2406.07524).

The last window is moved less where that is enough, so that the text gets exactly the length asked
for. Tokens given anywhere inside a window are seen from both sides.
"""

from .rounds import generate_rounds


def span(position: int, params) -> tuple[int, int]:
    width = min(params.window, params.length)
    stride = max(1, width // 2)
    moves = max(0, -(-(position + 1 - width) // stride))
    stop = min(moves * stride + width, params.length)
    return stop - width, stop


def generate_windows(denoise, requests, params, *, device, watch, tick):
    return generate_rounds(span, denoise, requests, params, device=device, watch=watch, tick=tick)
