"""Networks for tests: those of the recordings and small random ones; and how close is close."""

import torch
from conftest import load, load_json

from models.dit import DiT

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
