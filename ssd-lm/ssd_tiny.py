"""A tiny SSD-LM in the published layout, for trying things: random weights, its own tokenizer.

Its text is noise, but every step is the real one: the same files, decoding and report.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


def make_tiny(folder: Path, texts: Iterable[str], *, vocab_size=400, width=32, seed=0) -> Path:
    """A RoBERTa masked LM, its tokenizer and the two layers beside it, in `folder`."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=130,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = RobertaForMaskedLM(config)
    randomise(model, generator)
    model.save_pretrained(folder)
    embed_sum = model.get_input_embeddings().weight.detach().T.clone()
    torch.save({"module.weight": embed_sum}, folder / "embed_sum_layer.pt")
    layer = nn.Linear(1, width)
    randomise(layer, generator)
    timestep = {f"module.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save(timestep, folder / "timestep_layer.pt")
    save_tokenizer(tokenizer, folder)
    return folder


def make_judge(folder: Path, texts: Iterable[str], *, vocab_size=400, width=32, seed=1) -> Path:
    """A tiny GPT-2 with a tokenizer of its own, in place of gpt2-large."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts, vocab_size)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=1024,
        n_embd=width,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Normal weights wide enough that the logits are not flat; biases and norms as they are."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                scale = 2 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def make_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE with RoBERTa's special tokens in its order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
