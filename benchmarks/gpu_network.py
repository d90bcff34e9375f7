"""What the parts of gpu.py share: the network that is measured, and the device."""

import gc
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from models.dit import DiT

SMALL = {"hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
XL = {"hidden_size": 2048, "cond_dim": 128, "n_blocks": 20, "n_heads": 16}
TINY = {"hidden_size": 32, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def network(
    args, *, algo="bamdlm", backend="sdpa", compiled=False, dropout=0.0, n_blocks=None
) -> DiT:
    """Made where it will be: numbers for 170 million weights take a CPU seconds."""
    sizes = args.sizes if n_blocks is None else args.sizes | {"n_blocks": n_blocks}
    torch.manual_seed(0)
    with args.device, torch.no_grad():
        net = DiT(
            vocab_size=args.vocab,
            dropout=dropout,
            adaln=algo != "ar",
            attn_backend=backend,
            compile=compiled,
            **sizes,
        )
        for name, parameter in net.named_parameters():
            if name.startswith("output_layer") or "adaLN" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return net


def autocast(device: torch.device, dtype):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def release(device: torch.device) -> None:
    """Memory that nothing holds any more goes back to the device."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def await_turn(turn: Path | None, device: torch.device) -> None:
    """Where several processes compile beside each other: waits until this one may be timed."""
    if turn is None:
        return
    release(device)
    (turn / "ready").touch()
    await_file(turn / "go")


def await_file(path: Path) -> None:
    """Ends the process where the folder is gone, and with it who would make the file."""
    while not path.exists():
        if not path.parent.exists():
            raise SystemExit(f"{path.parent} is gone: nothing is measured")
        time.sleep(0.1)


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name()
