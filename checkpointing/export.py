"""A checkpoint as a folder that transformers loads, with the project's own files of the network.

The folder holds averaged weights under the published names, config.json, the tokenizer, a model
card, and the sources: what scripts/hub_files/modeling_bd3lm.py imports of models/ and samplers/,
side by side, because transformers copies no packages. In them `from models.x` becomes `from .x`,
and `from noise_schedule` becomes `from .noise_schedule`.
"""

import json
import re
from pathlib import Path
from string import Template

import torch

from checkpointing import served
from checkpointing.checkpoint import Checkpoint, section
from checkpointing.layouts import INTERVAL
from checkpointing.load import build_backbone_args, build_network, is_llama, load_into
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.served import sdar_config
from checkpointing.trained import begins_with_bos
from checkpointing.vocabulary import with_mask
from data.tokenizer import Tokenizer
from models.adaptation import PLAIN, Adaptation
from models.llama import LlamaShape
from objectives.algorithms import get_algorithm
from utils import atomic_folder, listed

ROOT = Path(__file__).parents[1]
ENTRY = ROOT / "scripts" / "hub_files" / "modeling_bd3lm.py"
CARD = ROOT / "scripts" / "hub_files" / "model_card.md"
CLASSES = {"AutoConfig": "BD3LMConfig", "AutoModel": "BD3LM", "AutoModelForMaskedLM": "BD3LM"}
CAUSAL = {"AutoModelForCausalLM": "BD3LMForCausalLM"}  # rows about the next token
CARD_SECTIONS = (
    "adapt",
    "algo",
    "block_size",
    "data",
    "loader",
    "lora",
    "lr_scheduler",
    "model",
    "noise",
    "optim",
    "seed",
    "training",
)
FOLDERS = ("models", "models/kernels", "samplers")
ELSEWHERE = re.compile(
    r"^from (models\.(kernels\.)?|\.kernels\.|(?=noise_schedule ))", re.MULTILINE
)
IMPORTED = re.compile(r"^ *from \.(\w+) import", re.MULTILINE)


def sources() -> dict[str, str]:
    """{file name in the export: its text}: the entry, and all that is imported from there on."""
    paths = [ENTRY, ROOT / "noise_schedule.py"]
    paths += [path for name in FOLDERS for path in (ROOT / name).glob("[!_]*.py")]
    known = {path.name: path for path in paths}
    assert len(known) == len(paths), "two files of an export would have the same name"
    wanted, found = [ENTRY.name], {}
    for name in wanted:  # grows on the way
        found[name] = ELSEWHERE.sub("from .", known[name].read_text())
        others = [f"{module}.py" for module in IMPORTED.findall(found[name])]
        wanted += [other for other in dict.fromkeys(others) if other not in wanted]
    return found


def export(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    use_ema: bool = True,
    algo: str | None = None,
    overwrite: bool = False,
    form: str = "project",
) -> Path:
    """Write the folder: complete, or not at all. `algo` where the checkpoint does not say; form: of
    FORMS."""
    from safetensors.torch import save_file

    folder = Path(folder)
    check_free(folder, overwrite)
    algo = algo or checkpoint.algo
    checkpoint, _ = with_mask(checkpoint, tokenizer, tokenizer.hf.name_or_path)
    _check(checkpoint, algo, tokenizer.vocab_size)
    network = build_network(checkpoint)
    config, prefix, texts = FORMS[form](checkpoint, tokenizer, algo, use_ema)
    load_into(network, checkpoint, use_ema=use_ema, algo=algo)
    tensors = {f"{prefix}{k}": v.detach().contiguous() for k, v in network.state_dict().items()}
    if config.get("var_min"):
        tensors |= {name: torch.tensor(config[name]) for name in INTERVAL}
    with atomic_folder(folder, overwrite=True) as made:
        tokenizer.save(made)
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, text in texts.items():
            (made / name).write_text(text)
    return folder


def check_free(folder: str | Path, overwrite: bool) -> None:
    """CheckpointError where there is something that would be replaced, and nobody asked for it."""
    place = Path(folder)
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty: name another folder, or give --overwrite")


def project(checkpoint: Checkpoint, tokenizer: Tokenizer, algo: str, use_ema: bool) -> tuple:
    """config.json, what stands before the names of weights, and the other files, {name: text}."""
    config = hub_config(checkpoint, tokenizer, algo)
    backbone = "llama" if is_llama(checkpoint) else "hf_dit"
    texts = {"README.md": card(checkpoint, config, use_ema, CARD, backbone)}
    return config, "backbone.", texts | sources()


def sdar(checkpoint: Checkpoint, tokenizer: Tokenizer, algo: str, use_ema: bool) -> tuple:
    shape = LlamaShape(**build_backbone_args(checkpoint)) if is_llama(checkpoint) else None
    config = sdar_config(checkpoint, shape, tokenizer, algo)
    about = {"algo": algo, "model_length": checkpoint.length, **config}
    texts = {"README.md": card(checkpoint, about, use_ema, served.CARD, "llama")}
    texts[served.CONFIGURATION.name] = served.CONFIGURATION.read_text()
    return config, "", texts


FORMS = {"project": project, "sdar": sdar}  # export_hf.py --format


def hub_config(checkpoint: Checkpoint, tokenizer: Tokenizer, algo: str | None = None) -> dict:
    """config.json: the published keys, and those that `generate` needs."""
    algo = algo or checkpoint.algo
    _check(checkpoint, algo, tokenizer.vocab_size)
    trains, length = get_algorithm(algo), checkpoint.length
    settings = checkpoint.algo_settings
    low, high = checkpoint.interval or (1e-3, 1.0)
    block_size = 1 if trains.causal else length
    several = len(checkpoint.block_sizes) > 1
    adapt = {"clean": "block", "label": "same"}
    adapt = {name: checkpoint.adapt.get(name, value) for name, value in adapt.items()}
    adapted = Adaptation.named(**adapt) != PLAIN
    classes = CLASSES | (CAUSAL if trains.causal else {})
    return {
        **_sizes(checkpoint),
        "algo": algo,
        "architectures": ["BD3LM"],
        "attn_backend": "sdpa",
        "auto_map": {auto: f"{ENTRY.stem}.{name}" for auto, name in classes.items()},
        "begins_with_bos": begins_with_bos(checkpoint),
        "block_size": checkpoint.block_size if trains.blocks else block_size,
        **({"block_sizes": list(checkpoint.block_sizes)} if several else {}),
        **({"adapt": adapt} if adapted else {}),
        "bos_token_id": tokenizer.bos_id,
        "causal": trains.causal,
        "cross_attn": trains.blocks,
        "dtype": "float32",
        "eos_token_id": tokenizer.eos_id,
        "mask_token_id": tokenizer.mask_id,
        "mdlm_loss_scale": settings.get("mdlm_loss_scale", False),
        "model_length": length,
        "model_type": "bd3lm",
        "noise": checkpoint.noise,
        "pad_token_id": tokenizer.pad_id,
        "return_dict": True,
        "sampling_eps_max": high,
        "sampling_eps_min": low,
        "time_conditioning": settings.get("time_conditioning", trains.time_conditioning),
        "var_min": trains.blocks,
    }


def _sizes(checkpoint: Checkpoint) -> dict:
    sizes = build_backbone_args(checkpoint)
    if not is_llama(checkpoint):
        return {**sizes, "hidden_dim": sizes.pop("hidden_size")}
    shown = {name: sizes[name] for name in ("vocab_size", "n_blocks", "n_heads")}
    return {**shown, "hidden_dim": sizes["hidden_size"], "dropout": 0.0, "llama": sizes}


def _check(checkpoint: Checkpoint, algo: str | None, known: int) -> None:
    """known: ids of the tokenizer."""
    ids = build_backbone_args(checkpoint)["vocab_size"]
    if algo not in checkpoint.algorithms:
        choice = ", ".join(checkpoint.algorithms)
        raise CheckpointError(f"{checkpoint.source} may be {choice}: give --algo, got {algo}")
    if ids < known or (ids > known and not is_llama(checkpoint)):  # which may have spare rows
        raise CheckpointError(
            f"{checkpoint.source} has {ids} ids, the tokenizer {known} (mask included): give the"
            " right one with --tokenizer"
        )
    if checkpoint.length is None:
        raise CheckpointError(f"{checkpoint.source} does not tell the length it was trained at")


def card(checkpoint: Checkpoint, config: dict, use_ema: bool, template: Path, backbone: str) -> str:
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
    if is_llama(checkpoint) and "model" in trained:  # whose settings may say other sizes
        sizes, model = build_backbone_args(checkpoint), trained["model"]
        trained["model"] = {key: sizes.get(key, value) for key, value in model.items()}
    sizes = listed(config.get("block_sizes", [config["block_size"]]))
    return Template(template.read_text()).substitute(
        name=f"{config['algo']}, block size {sizes}",
        source=Path(checkpoint.source).name,
        figures="\n".join(rows),
        algo=config["algo"],
        backbone=backbone,
        mask_id=config["mask_token_id"],
        length=config["model_length"],
        block_size=sizes,
        training=json.dumps(trained, indent=2, sort_keys=True, default=str),
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
