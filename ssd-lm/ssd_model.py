"""SSD-LM as it is published: a RoBERTa masked language model and two linear layers beside it.

    config.json, model.safetensors (or pytorch_model.bin), tokenizer files
    embed_sum_layer.pt    {"module.weight" [E, V]}: a distribution over tokens becomes an embedding
    timestep_layer.pt     {"module.weight" [E, 1], "module.bias" [E]}: t / T becomes an embedding

`extra_layers.safetensors` (embed_sum_layer.weight, timestep_layer.weight, timestep_layer.bias)
takes the place of the two .pt files where it exists. Nothing is loaded in part: a missing, left
over or misshapen tensor is an error, and pickles are read as tensors only.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ssd_folder import LAYERS_TOGETHER, ModelError, folder_problems
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = {
    "embed_sum_layer": {"weight": ("E", "V")},
    "timestep_layer": {"weight": ("E", 1), "bias": ("E",)},
}
# In files of older versions of transformers; the model rebuilds these, or has no use for them.
REBUILT = ("roberta.embeddings.position_ids", "roberta.pooler.", "lm_head.decoder.")


@dataclass(frozen=True)
class Context:
    """What a block sees before itself."""

    embeddings: Tensor  # [B, C, E]
    real: Tensor | None = None  # bool [B, C] where lengths differ; padded on the left


@dataclass(frozen=True)
class SSDLM:
    roberta: nn.Module  # RobertaForMaskedLM in eval mode
    embed_sum: Tensor  # [E, V]
    time_weight: Tensor  # [E]
    time_bias: Tensor  # [E]

    @property
    def vocab_size(self) -> int:
        return self.embed_sum.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embed_sum.device

    @property
    def max_tokens(self) -> int:
        """Context and block together; RoBERTa's positions begin after the padding id."""
        config = self.roberta.config
        return config.max_position_embeddings - config.pad_token_id - 1

    def context(self, ids: Sequence[Sequence[int]]) -> Context:
        """ids: one list (or row of a tensor) per sample; lengths may differ and may be 0."""
        rows = [torch.as_tensor(row, dtype=torch.int64, device=self.device) for row in ids]
        width = max(len(row) for row in rows)
        real = torch.tensor(
            [[c >= width - len(row) for c in range(width)] for row in rows],
            dtype=torch.bool,
            device=self.device,
        ).view(len(rows), width)
        tokens = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
        embeddings = self.roberta.get_input_embeddings()(tokens)
        return Context(embeddings, None if real.all() else real)

    def embed(self, x: Tensor, time: float) -> Tensor:
        """The block's input embeddings [B, K, E] for simplex logits x [B, K, V] at time t / T."""
        parts = x.flatten(0, 1).split(rows_at_once(x))
        mixed = torch.cat([F.linear(part.softmax(-1), self.embed_sum) for part in parts])
        return mixed.view(*x.shape[:2], -1) + (self.time_weight * time + self.time_bias)

    def logits(self, context: Context, embedded: Tensor) -> Tensor:
        """The block's embeddings [B, K, E] after its context -> the block's logits [B, K, V]."""
        inputs = torch.cat([context.embeddings, embedded], 1)  # [B, C + K, E]
        mask = positions = None
        if context.real is not None:
            mask = F.pad(context.real, (0, embedded.shape[1]), value=True)
            first = self.roberta.config.pad_token_id + 1
            positions = (mask.cumsum(1) - 1).clamp(min=0) + first
        hidden = self.roberta.roberta(
            inputs_embeds=inputs,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
        ).last_hidden_state
        return self.roberta.lm_head(hidden[:, context.embeddings.shape[1] :])


def rows_at_once(x: Tensor) -> int:
    """Rows [V] of x to work on together: on a CPU 8 MiB, which stays in its caches; else all."""
    return max(1, (1 << 21) // x.shape[-1]) if x.device.type == "cpu" else x.shape[:-1].numel()


def load_model(folder: Path, device="cpu") -> SSDLM:
    roberta = _load_roberta(folder)
    table = roberta.get_input_embeddings().weight
    sizes = {"V": table.shape[0], "E": table.shape[1]}
    tensors = _load_layers(folder, sizes)
    roberta.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    return SSDLM(
        roberta,
        tensors["embed_sum_layer.weight"].to(device),
        tensors["timestep_layer.weight"][:, 0].to(device),
        tensors["timestep_layer.bias"].to(device),
    )


def _load_roberta(folder: Path) -> nn.Module:
    if problems := folder_problems(folder):
        raise ModelError("; ".join(problems))
    from safetensors import SafetensorError
    from transformers import RobertaForMaskedLM

    try:
        model, report = RobertaForMaskedLM.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"{folder}: the masked LM cannot be loaded: {error}") from error
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, names))[:5])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := [n for n in report[kind] if not str(n).startswith(REBUILT)])
    ]
    if problems:
        raise ModelError(f"{folder}: the weights do not fit config.json ({'; '.join(problems)})")
    return model


def _load_layers(folder: Path, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The two linear layers by full name, float32, shapes checked."""
    together = folder / LAYERS_TOGETHER
    if together.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(together)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{together} cannot be read: {error}") from error
        source = dict.fromkeys(LAYERS, together)
    else:
        found, source = {}, {}
        for layer in LAYERS:
            source[layer] = folder / f"{layer}.pt"
            for name, tensor in _read_layer(source[layer]).items():
                found[f"{layer}.{name}"] = tensor
    expected = {
        f"{layer}.{name}": shape for layer, names in LAYERS.items() for name, shape in names.items()
    }
    for name in sorted(expected.keys() | found.keys()):
        file = source.get(name.split(".")[0], together)
        if name not in found:
            raise ModelError(f"{file}: {name} is missing")
        if name not in expected:
            raise ModelError(f"{file}: {name} belongs to no layer of SSD-LM")
        shape = tuple(sizes.get(size, size) for size in expected[name])
        if tuple(found[name].shape) != shape:
            raise ModelError(
                f"{file}: {name} has shape {tuple(found[name].shape)}, the model needs {shape}"
            )
        if not found[name].is_floating_point():
            raise ModelError(f"{file}: {name} is {found[name].dtype}, not a floating point tensor")
    return {name: tensor.float() for name, tensor in found.items()}


def _read_layer(file: Path) -> dict[str, Tensor]:
    """A state dict of tensors; `module.` (DataParallel's) is taken off every name or off none."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{file} is not a plain file of tensors, and nothing else is unpickled"
            f" ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{file} does not hold a state dict of tensors")
    prefixed = [name.startswith("module.") for name in state]
    if any(prefixed) and not all(prefixed):
        raise ModelError(
            f"{file}: only some names start with 'module.': {', '.join(sorted(state))}"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder}: no tokenizer can be loaded ({reason})") from error
    if not tokenizer.encode("a", add_special_tokens=False):  # transformers does not complain
        raise ModelError(
            f"{folder}: no tokenizer can be loaded (tokenizer.json, or vocab.json with merges.txt,"
            " is missing); --tokenizer_name may name it"
        )
    return tokenizer


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}")


def pick_device(name: str | None) -> torch.device:
    """The one asked for, else the accelerator, else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device={name} cannot be used here ({reason})") from error
    return device
