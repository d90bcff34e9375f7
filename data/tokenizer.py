"""Text to ids and back.

Ids 0..V-1 contain the mask. A tokenizer without a mask token gets one more id, so that V is its
vocabulary size + 1 and the mask id is V - 1; one with a mask token (BERT, text8) keeps it. The mask
and the padding of GPT-2 share an id, as in the published models: padding is never counted or
attended, and no text encodes to it.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data import vocabularies
from utils import ALPHABET, digest, reason

MOST_IDS = 1 << 24


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
        found = self._encoded(self.hf.backend_tokenizer.encode_batch_fast, texts)
        return [encoding.ids for encoding in found]

    def encode_placed(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids [n], where each begins and ends in its text [n, 2]), of a fast tokenizer."""
        found = self._encoded(self._with_places.encode_batch, texts)
        return [(np.array(e.ids, np.int64), np.array(e.offsets).reshape(-1, 2)) for e in found]

    @cached_property
    def _with_places(self):
        """Without what comes after the ids are there: it moves the places of blanks."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import Sequence

        backend = Backend.from_str(self.hf.backend_tokenizer.to_str())
        backend.post_processor = Sequence([])
        return backend

    def _encoded(self, encode: Callable, texts: list[str]) -> list:
        try:
            return encode(texts, add_special_tokens=False)
        except BaseException as error:  # tokenizers raises nothing narrower; panics are below it
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            problem = self._unknown(texts) if isinstance(error, Exception) else None
            failed = f"data.tokenizer_name_or_path: its library failed ({reason(error)})"
            raise ValueError(problem or failed) from error

    def _unknown(self, texts: list[str]) -> str | None:
        """The first character that an alphabet (vocabularies.character_set) does not have."""
        known = self.hf.get_vocab().keys() - set(self.hf.all_special_tokens)
        found = ((text, i) for text in texts for i, c in enumerate(text) if c not in known)
        text, i = next(found, ("", 0))
        if not text or any(len(token) > 1 for token in known):
            return None
        return (
            f"the character {text[i]!r} (U+{ord(text[i]):04X}) is not among the {len(known)} of"
            f" data.tokenizer_name_or_path; it comes after {text[max(0, i - 20) : i]!r} in the text"
            f" that begins {text[:40]!r}. Add it to the alphabet, or take it out of the text"
        )

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
        """The same for the same mapping from text to ids, 16 hex digits. Tokenizers made here had
        <|endoftext|> outside of their model once; it is left out, so that names made of it stay."""
        if self.hf.is_fast:
            mapping = json.loads(self.hf.backend_tokenizer.to_str())
            parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
            mapping = {part: mapping[part] for part in parts}
            if self.hf.init_kwargs.get(vocabularies.END_INSIDE):
                del mapping["model"]["vocab"][vocabularies.END_OF_TEXT]
        else:
            mapping = [type(self.hf).__name__, self.hf.get_vocab()]
        ids = [self.vocab_size, self.mask_id, self.bos_id, self.eos_id, self.pad_id]
        return digest(json.dumps([mapping, ids], sort_keys=True), 16)


def get_tokenizer(
    tokenizer_name_or_path: str,
    *,
    eos_token: str | None = None,
    cache_dir: str | Path | None = None,
    source: str | None = None,
) -> Tokenizer:
    """By name (vocabularies.BUILTIN), alphabet ("characters:ACGT"), local folder or hub id.

    eos_token replaces the tokenizer's own end-of-sequence token (data.eos_token: the published LM1B
    models end documents with [CLS]). cache_dir keeps what is trained here; None trains it anew.
    source is where the corpus lies that a tokenizer is trained on (data.source).
    """
    name = tokenizer_name_or_path
    if name in vocabularies.BUILTIN:
        hf = vocabularies.BUILTIN[name](cache_dir, source)
    elif name.startswith(ALPHABET):
        hf = vocabularies.character_set(name.removeprefix(ALPHABET))
    elif Path(os.path.expanduser(name)).is_dir():
        hf = vocabularies.from_folder(Path(os.path.expanduser(name)))
    elif os.path.lexists(os.path.expanduser(name)):
        raise ValueError(
            f"data.tokenizer_name_or_path={name} is no folder: name one with a tokenizer.json"
        )
    elif name.startswith(("/", ".", "~")):
        raise FileNotFoundError(
            f"data.tokenizer_name_or_path={name} does not exist: name the folder where it lies now"
        )
    else:
        hf = vocabularies.from_hub(name)
    return wrap(hf, name, eos_token)


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
    _check_vocabulary(vocabulary, (bos, eos), name)
    if hf.is_fast:  # settings saved with some tokenizers, which would cut or pad documents
        hf.backend_tokenizer.no_truncation()
        hf.backend_tokenizer.no_padding()
    # Padding added at the end of a vocabulary takes the mask's id, as in the published models.
    top = max(id for token, id in vocabulary.items() if token != hf.pad_token)
    if top > MOST_IDS:
        raise ValueError(
            f"data.tokenizer_name_or_path={name} has the id {top:,}: a network has a row for each,"
            f" and at most {MOST_IDS:,} are allowed"
        )
    mask = hf.mask_token_id if hf.mask_token is not None else max(hf.vocab_size, top + 1)
    return Tokenizer(
        hf=hf,
        vocab_size=max(hf.vocab_size, top + 1, mask + 1),
        mask_id=mask,
        bos_id=vocabulary[bos],
        eos_id=vocabulary[eos],
        pad_id=mask if hf.pad_token is None else hf.pad_token_id,
    )


def _check_vocabulary(vocabulary: dict[str, int], needed: tuple[str, ...], name: str) -> None:
    """ValueError where it lacks a token that is needed, or two tokens have one id."""
    for token in needed:
        if token not in vocabulary:
            raise ValueError(
                f"data.eos_token={token!r} is not in the vocabulary of the tokenizer {name}"
                f" ({len(vocabulary)} tokens); name one that is"
            )
    if len(named := {id: token for token, id in vocabulary.items()}) < len(vocabulary):
        twice = next(token for token, id in vocabulary.items() if named[id] != token)
        both = " and ".join(sorted([repr(twice), repr(named[vocabulary[twice]])]))
        raise ValueError(
            f"data.tokenizer_name_or_path={name}: {both} have the same id: a text would come back"
            " as another"
        )
