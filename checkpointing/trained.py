"""A trained network and its tokenizer, as the checkpoint itself says."""

from pathlib import Path

from checkpointing.as_trained import check_as_trained
from checkpointing.checkpoint import Checkpoint, section
from checkpointing.load import build_network, is_llama, load_into
from checkpointing.vocabulary import has_words, place_of, with_mask
from data.tokenizer import Tokenizer, get_tokenizer
from models.network import Network


def trained_tokenizer(found: Checkpoint, name: str | None = None, cache_dir=None) -> Tokenizer:
    """The tokenizer `name`, else the one that the checkpoint was trained with, with the
    checkpoint's own EOS. CheckpointError where it is another one."""
    name = name or tokenizer_name(found)
    eos_token = section(found.config, "data").get("eos_token")
    words = get_tokenizer(name, eos_token=eos_token, cache_dir=cache_dir)
    check_as_trained(found, None, words, name)
    return words


def tokenizer_name(found: Checkpoint) -> str:
    """A run says it, an export of this project has it in its folder; the published models have
    GPT-2's."""
    if said := section(found.config, "data").get("tokenizer_name_or_path"):
        return said
    if found.layout == "transformers":
        return place_of(found)
    folder = Path(found.source).expanduser()
    exported = found.layout == "hub" and "algo" in found.config  # only our exports say it
    holds = has_words(folder) if folder.is_dir() else exported
    return found.source if holds else "gpt2"


def begins_with_bos(found: Checkpoint) -> bool:
    """Whether the rows it was trained on begin with BOS. The published code puts it there where a
    run does not say otherwise; its exports do not tell."""
    if found.layout == "lightning":
        return bool(section(found.config, "data").get("insert_train_special", True))
    return bool(found.config.get("begins_with_bos", False))


def trained_network(
    found: Checkpoint, words: Tokenizer, algo: str, use_ema: bool = True
) -> Network:
    found, _ = with_mask(found, words, words.hf.name_or_path)
    network = build_network(found, attn_backend="sdpa")
    if not fits_vocabulary(found, network, words):
        raise ValueError(
            f"{found.source} has {network.vocab_size} ids, the tokenizer {words.vocab_size}:"
            " give the one it was trained with as tokenizer="
        )
    load_into(network, found, use_ema=use_ema, algo=algo)
    return network


def fits_vocabulary(found: Checkpoint, network: Network, words: Tokenizer) -> bool:
    """A row for each id; models of transformers may have spare ones."""
    if is_llama(found):
        return network.vocab_size >= words.vocab_size
    return network.vocab_size == words.vocab_size
