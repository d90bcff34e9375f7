"""What tests of samplers share: denoisers, recorded random numbers, exact laws by enumeration."""

import torch
from networks import CHECKPOINTS, MASK, recorded

from noise_schedule import get_schedule
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.sedd import ScoreEntropy
from samplers.params import SamplingParams
from samplers.request import Sample, TextRequest
from samplers.writing import generate


def denoiser(backbone, algo: str, mask_id: int, block_size: int = 1):
    """What modes/build.py makes of a network."""
    if algo == "ar":
        return Autoregressive(mask_id=mask_id).denoiser(backbone)
    schedule = get_schedule("loglinear")
    if algo == "sedd":
        return ScoreEntropy(mask_id=mask_id, schedule=schedule).denoiser(backbone)
    whole = algo == "mdlm"
    objective = MaskedDiffusion(mask_id, block_size, schedule, whole_window=whole)
    return objective.denoiser(backbone)


def recorded_denoiser(name: str):
    entry = CHECKPOINTS[name]
    algo = {"bd3lm": "bamdlm"}.get(entry["algo"], entry["algo"])
    return algo, denoiser(recorded(name), algo, MASK, entry["block_size"])


def write(algo, denoise, rows, **params) -> list[Sample]:
    """Samples in order of rows. `rows`: how many, or a list of requests."""
    params = SamplingParams(**{"bos_id": 0, "eos_id": 0} | params)
    if isinstance(rows, int):
        rows = [TextRequest(row, (params.bos_id,)) for row in range(rows)]
    found = [s for group in generate(algo, denoise, rows, params) for s in group]
    return sorted(found, key=lambda sample: sample.row)


class Table:
    """A denoiser without a network: `law(tokens [T] list, position) -> weights of the V tokens`.

    With `causal` blocks it sees what a block-causal network sees; `next_token` answers about the
    token after the position asked for, as AR does. A cache is the list of committed tokens.
    """

    def __init__(self, law, vocab_size, mask_id, block_size=None, next_token=False):
        self.law, self.vocab_size, self.mask_id = law, vocab_size, mask_id
        self.block_size, self.next_token = block_size, next_token
        self.memory = {}

    def __call__(self, tokens, read, cache=None):
        out = []
        for b, row in enumerate(tokens.tolist()):
            past = [] if cache is None else cache.tokens[b][: cache.counts[b]]
            if cache is not None:
                cache.tokens[b] = past + row
            out.append([self.distribution(past + row, len(past) + p) for p in read[b].tolist()])
        return torch.stack([torch.stack(row) for row in out])

    def distribution(self, tokens, position):
        if self.next_token:
            tokens, position = tokens[: position + 1], position + 1
        elif self.block_size is not None:
            tokens = tokens[: (position // self.block_size + 1) * self.block_size]
        name = (tuple(tokens), position)
        if name not in self.memory:
            weights = torch.as_tensor(self.law(list(tokens), position), dtype=torch.float32)
            weights = weights.log()
            weights[self.mask_id] = -torch.inf
            self.memory[name] = weights.log_softmax(-1)
        return self.memory[name]

    def new_cache(self, batch, window):
        return TableCache([[] for _ in range(batch)], [0] * batch)


class TableCache:
    def __init__(self, tokens, counts):
        self.tokens, self.counts = tokens, counts

    def commit(self, tokens):
        more = tokens.tolist() if torch.is_tensor(tokens) else [tokens] * len(self.counts)
        return TableCache(self.tokens, [a + b for a, b in zip(self.counts, more, strict=True)])

    def reset(self, rows):
        counts = [0 if r else n for n, r in zip(self.counts, rows.tolist(), strict=True)]
        return TableCache(self.tokens, counts)

    def select(self, rows):
        keep = rows.tolist()
        return TableCache([self.tokens[i] for i in keep], [self.counts[i] for i in keep])
