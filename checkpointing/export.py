"""A checkpoint as a folder that transformers loads, with the project's own files of the network.

The folder holds averaged weights under the published names, config.json, the tokenizer, a model
card, and the sources: those of models/ and samplers/ side by side, because transformers copies no
packages. Only what one imports from the other is changed: `from models.x` becomes `from .x`, and
`from noise_schedule` becomes `from .noise_schedule`.
"""

import json
import re
from pathlib import Path
from string import Template

import torch

from checkpointing.load import Checkpoint, CheckpointError, build_backbone_args, load_into, section
from data.tokenizer import Tokenizer
from models.dit import DiT
from utils import atomic_folder

ROOT = Path(__file__).parents[1]
ENTRY = ROOT / "scripts" / "hub_files" / "modeling_bd3lm.py"
CARD = ROOT / "scripts" / "hub_files" / "model_card.md"
NETWORK = (
    "attention",
    "block",
    "cache",
    "compiling",
    "decode",
    "denoiser",
    "dit",
    "hf",
    "layers",
    "masks",
    "randomness",
)
CLASSES = {"AutoConfig": "BD3LMConfig", "AutoModel": "BD3LM", "AutoModelForMaskedLM": "BD3LM"}
IMPORTS = re.compile(r"^from (models\.|(?=noise_schedule ))", re.MULTILINE)


def sources() -> dict[str, Path]:
    """{file name in the export: the file it is}."""
    files = {f"{name}.py": ROOT / "models" / f"{name}.py" for name in NETWORK}
    samplers = sorted((ROOT / "samplers").glob("[!_]*.py"))
    others = {path.name: path for path in (*samplers, ROOT / "noise_schedule.py", ENTRY)}
    clash = files.keys() & others.keys()
    assert not clash, f"two files of an export would have the name {clash}"
    return files | others


def export(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    use_ema: bool = True,
    algo: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the folder: complete, or not at all. `algo` where the checkpoint does not say."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty: name another folder, or give --overwrite")
    config = hub_config(checkpoint, tokenizer, algo)
    tensors = named_tensors(checkpoint, config, use_ema)
    with atomic_folder(folder, overwrite=True) as made:
        write(made, config, tensors, tokenizer, card(checkpoint, config, use_ema))
    return folder


def write(folder: Path, config: dict, tensors: dict, tokenizer: Tokenizer, text: str) -> None:
    from safetensors.torch import save_file

    tokenizer.save(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(text)
    for name, path in sources().items():
        text = IMPORTS.sub("from .", path.read_text())
        (folder / name).write_text(text)


def named_tensors(checkpoint: Checkpoint, config: dict, use_ema: bool) -> dict[str, torch.Tensor]:
    """Contents of model.safetensors, after a network has taken them."""
    network = DiT(**build_backbone_args(checkpoint))
    load_into(network, checkpoint, use_ema=use_ema, algo=config["algo"])
    tensors = {f"backbone.{k}": v.detach().contiguous() for k, v in network.state_dict().items()}
    if config["var_min"]:
        for name in ("sampling_eps_min", "sampling_eps_max"):
            tensors[name] = torch.tensor(config[name])
    return tensors


def hub_config(checkpoint: Checkpoint, tokenizer: Tokenizer, algo: str | None = None) -> dict:
    """config.json: the published keys, and those that `generate` needs."""
    algo = algo or checkpoint.algo
    sizes = build_backbone_args(checkpoint)
    _check(checkpoint, algo, sizes["vocab_size"], tokenizer.vocab_size)
    length = checkpoint.length
    config = {
        "adaln": sizes["adaln"],
        "architectures": ["BD3LM"],
        "attn_backend": "sdpa",
        "auto_map": {auto: f"{ENTRY.stem}.{name}" for auto, name in CLASSES.items()},
        "bos_token_id": tokenizer.bos_id,
        "cond_dim": sizes["cond_dim"],
        "dropout": sizes["dropout"],
        "dtype": "float32",
        "eos_token_id": tokenizer.eos_id,
        "hidden_dim": sizes["hidden_size"],
        "mask_token_id": tokenizer.mask_id,
        "model_length": length,
        "model_type": "bd3lm",
        "n_blocks": sizes["n_blocks"],
        "n_heads": sizes["n_heads"],
        "pad_token_id": tokenizer.pad_id,
        "return_dict": True,
        "vocab_size": sizes["vocab_size"],
    }
    return dict(sorted({**config, **_algorithm(checkpoint, algo, length)}.items()))


def _check(checkpoint: Checkpoint, algo: str | None, ids: int, known: int) -> None:
    """ids: of the weights; known: of the tokenizer."""
    if algo not in checkpoint.algorithms:
        choice = ", ".join(checkpoint.algorithms)
        raise CheckpointError(f"{checkpoint.source} may be {choice}: give --algo, got {algo}")
    if ids != known:
        raise CheckpointError(
            f"{checkpoint.source} has {ids} ids, the tokenizer {known} (mask included): give the"
            " right one with --tokenizer"
        )
    if checkpoint.length is None:
        raise CheckpointError(f"{checkpoint.source} does not tell the length it was trained at")


def _algorithm(checkpoint: Checkpoint, algo: str, length: int) -> dict:
    """The keys of config.json that follow from the algorithm and its settings."""
    settings, noise = checkpoint.config, checkpoint.config.get("noise", "loglinear")
    if checkpoint.layout == "lightning":
        settings = section(checkpoint.config, "algo")
        noise = section(checkpoint.config, "noise").get("type", "loglinear")
    low, high = checkpoint.interval or (1e-3, 1.0)
    blocks = algo == "bamdlm"
    return {
        "algo": algo,
        "block_size": checkpoint.block_size if blocks else 1 if algo == "ar" else length,
        "causal": algo == "ar",
        "cross_attn": blocks,
        "mdlm_loss_scale": settings.get("mdlm_loss_scale", False),
        "noise": noise,
        "sampling_eps_max": high,
        "sampling_eps_min": low,
        "time_conditioning": settings.get("time_conditioning", algo == "sedd"),
        "var_min": blocks,
    }


def card(checkpoint: Checkpoint, config: dict, use_ema: bool) -> str:
    """The model card: what was trained, on what, with what result."""
    run = checkpoint.config if checkpoint.layout == "lightning" else {}
    figures = {"optimizer steps": checkpoint.step, **best_validation(checkpoint.raw)}
    if checkpoint.interval is not None:
        figures["clipped noise interval"] = "{:.4g} to {:.4g}".format(*checkpoint.interval)
    figures["weights"] = (
        f"averaged (EMA, decay {checkpoint.ema_decay}, {checkpoint.ema_updates} updates)"
        if use_ema and checkpoint.ema is not None
        else "as in the source"
    )
    rows = [f"| {name} | {value} |" for name, value in figures.items() if value is not None]
    trained = {key: run[key] for key in CARD_SECTIONS if key in run}
    return Template(CARD.read_text()).substitute(
        name=f"{config['algo']}, block size {config['block_size']}",
        source=Path(checkpoint.source).name,
        figures="\n".join(rows),
        algo=config["algo"],
        length=config["model_length"],
        block_size=config["block_size"],
        training=json.dumps(trained, indent=2, sort_keys=True, default=str),
    )


CARD_SECTIONS = (
    *("algo", "block_size", "data", "loader", "lr_scheduler", "model", "noise", "optim"),
    *("seed", "training"),
)


def best_validation(raw: dict) -> dict[str, str]:
    """Best validation likelihood, from the states of Lightning's checkpoint callbacks."""
    for state in section(raw, "callbacks").values():
        score = state.get("best_model_score") if isinstance(state, dict) else None
        if score is not None and state.get("monitor") == "val/nll":
            nll = torch.as_tensor(score, dtype=torch.float64)
            return {
                "best validation NLL (nats per token)": f"{nll:.4f}",
                "best validation perplexity": f"{nll.exp():.2f}",
            }
    return {}
