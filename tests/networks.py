"""Networks for tests: those of the recordings and small random ones; and how close is close."""

import torch
from conftest import load, load_json

from evaluation.estimators import AskedTexts
from models.dit import DiT
from models.llama import Llama
from training.optimizers import trained

MANIFEST = load_json("manifest.json")
MASK = MANIFEST["mask_index"]
LENGTH = MANIFEST["length"]
CHECKPOINTS = {entry["name"]: entry for entry in MANIFEST["checkpoints"]}
BLOCKWISE = [name for name, entry in CHECKPOINTS.items() if entry["algo"] == "bd3lm"]
LOGITS = 1e-5  # of the tensor's scale: float32 logits and losses
GRADIENTS = 1e-4  # of the tensor's norm


def architecture(algo: str) -> dict:
    return {
        "vocab_size": MASK + 1,
        "hidden_size": MANIFEST["hidden_size"],
        "cond_dim": MANIFEST["cond_dim"],
        "n_blocks": MANIFEST["n_blocks"],
        "n_heads": MANIFEST["n_heads"],
        "dropout": 0.0,
        "adaln": algo != "ar",
    }


def recorded_weights(name: str, prefix: str = "backbone.") -> dict:
    """Weights of a recorded checkpoint by our parameter names; prefix "ema.backbone." for the
    average."""
    tensors = load(CHECKPOINTS[name]["weights"])
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def recorded(name: str) -> DiT:
    net = DiT(**architecture(CHECKPOINTS[name]["algo"]))
    net.load_state_dict(recorded_weights(name))
    return net.eval()


def small(vocab_size=7, *, seed=0, adaln=True, n_blocks=2, hidden_size=16, **kwargs) -> DiT:
    """A network whose every weight is random, so that nothing is hidden by the zeros it starts
    with."""
    net = DiT(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        cond_dim=8,
        n_blocks=n_blocks,
        n_heads=2,
        dropout=0.0,
        adaln=adaln,
        **kwargs,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net.eval()


def texts(rows: int, length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Random tokens below `vocab_size`, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def allocated(call) -> int:
    """Bytes that a call on the CPU takes at most, beyond what there was."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as made:
        call()
    events = made.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(torch.tensor([change for _, change in changes]).cumsum(0).max())


def assert_within(ours, recorded, tolerance: float, what: str = "") -> float:
    """The largest difference is at most `tolerance` of the largest recorded value. Returns that
    share."""
    assert ours.shape == recorded.shape, f"{what}: {ours.shape} is not {recorded.shape}"
    gap, scale = (ours.detach() - recorded).abs().max(), recorded.abs().max()
    assert gap <= tolerance * scale, f"{what}: off by {gap:.2e} at a scale of {scale:.2e}"
    return float(gap / scale) if gap else 0.0


def without_mask(logits):
    """All columns but the mask token's, whose recorded value is a stand-in for minus infinity."""
    return torch.cat([logits[..., :MASK], logits[..., MASK + 1 :]], -1)


def chi_square_p(counts, expected) -> float:
    """The probability that a true distribution strays as far from `expected` counts as `counts`
    does."""
    counts, expected = counts.flatten().double(), expected.flatten().double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def loss_at(objective, backbone, *corrupted, **settings):
    """TokenLoss of a given corruption; arguments as for `loss_inputs_at`."""
    inputs = objective.loss_inputs_at(*corrupted, **settings)
    return objective.compute_loss(backbone, inputs)


def toy_log_probs(x_t, vocabulary):
    """The recorded network without weights: x_t [B, S], `vocabulary` is the mask -> [B, S, V]."""
    places, words = torch.arange(x_t.shape[1]).double(), torch.arange(vocabulary).double()
    i, j, v = places[:, None, None], places[None, :, None], words[None, None, :]
    base = torch.sin(1 + 3 * i[:, 0] + 7 * v[0])  # [S, V]
    angle = 2 + 5 * i + 3 * j + 11 * v + 13 * x_t[:, None, :, None].double()  # [B, S, S, V]
    seen = (x_t != vocabulary)[:, None, :, None]
    return (base + (angle.cos() * seen).sum(2)).log_softmax(-1)


def toy(vocabulary):
    def ask(x_t, read, reduce):
        log_probs = toy_log_probs(x_t, vocabulary).flatten(0, 1)[read]
        # in pieces, as a network's head gives them
        parts = zip(log_probs.tensor_split(3), read.tensor_split(3), strict=True)
        return torch.cat([reduce(*part) for part in parts])

    return ask


def texts_of(x0, vocabulary, block_size=None):
    x0 = torch.as_tensor(x0)
    return AskedTexts(
        x0, torch.ones_like(x0, dtype=torch.bool), block_size or x0.shape[1], vocabulary
    )


def small_llama(vocab_size=7, *, seed=0, **changes) -> Llama:
    """A network of models/llama.py with everything that one can have, every weight random."""
    shape = {
        "hidden_size": 16,
        "n_blocks": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 20,
        "qk_norm": True,
        "qkv_bias": True,
    }
    net = Llama(vocab_size=vocab_size, **(shape | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return net.eval()


def randomised(net, std=0.3):
    """Every number that is trained is random: of adapters, where B begins as 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in trained(net):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return net
