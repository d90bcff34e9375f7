"""Conversations as ids, of which those that enter the loss carry packing.SCORED.

Scored are the answers: from what the model is asked with up to the first special token behind the
content, which ends the turn; without one, to the end of the turn. A template may mark more with
{% generation %}. A token that holds a character of both is an answer's. What follows the last
answer is left out, and EOS stands behind it where the template has no special token there.

The rest of the last block belongs to the conversation. For training it is EOS, and scored: the
model writes whole blocks, and must know how to fill the last one. For evaluation it is masked and
stays so: then the figure is of the answers alone, and what would fill the block tells nothing of
their length.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.chat.records import read_back
from data.chat.rendering import PLAIN, Answer, Renderer, Template
from data.packing import SCORED
from data.tokenizer import Tokenizer
from utils import digest

FORMAT = 1  # raise it when the same conversations would give other ids


@dataclass(frozen=True)
class ChatEncoder:
    """Texts of data/chat/records.py -> ids; none of a conversation that is longer than a row.

    length: tokens of a row. align: of a block, which the last one fills. train: whether with EOS.
    """

    tokenizer: Tokenizer
    length: int
    align: int
    train: bool

    def __post_init__(self):
        if not self.tokenizer.hf.is_fast:
            raise ValueError(
                "data.format=chat needs a tokenizer that tells the place of each token in the text"
                " (a fast one, with a tokenizer.json); name another data.tokenizer_name_or_path"
            )

    @cached_property
    def template(self) -> Template:
        hf, tokenizer = self.tokenizer.hf, self.tokenizer
        source = hf.chat_template
        if isinstance(source, dict):
            source = source.get("default")
            if source is None:
                raise ValueError(
                    "data.tokenizer_name_or_path has chat templates, but none named 'default': "
                    + ", ".join(map(repr, hf.chat_template))
                )
        if source is not None:
            texts = {k: v for k, v in hf.special_tokens_map.items() if isinstance(v, str)}
            return Template(source, texts)
        bos, eos = hf.convert_ids_to_tokens([tokenizer.bos_id, tokenizer.eos_id])
        return Template(PLAIN, {"bos_token": bos, "eos_token": eos})

    @property
    def about(self) -> dict:
        """What decides the ids beside the tokenizer and the shape of the rows."""
        made = repr((self.template.source, sorted(self.template.tokens.items())))
        return {
            "template": digest(made, 16),
            "fill": "eos" if self.train else "mask",
            "format": FORMAT,
        }

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.template)

    @cached_property
    def special(self) -> np.ndarray:
        """Ids of tokens that are no text."""
        hf = self.tokenizer.hf
        added = [id for id, token in hf.added_tokens_decoder.items() if token.special]
        return np.array([*added, *hf.all_special_ids, self.tokenizer.eos_id])

    def __call__(self, texts: list[str]) -> list[list[int]]:
        rendered = [self._rendered(text) for text in texts]
        placed = self.tokenizer.encode_placed([text for text, _ in rendered])
        return [
            self._ids(ids, places, found)
            for (ids, places), (_, found) in zip(placed, rendered, strict=True)
        ]

    def _rendered(self, text: str) -> tuple[str, list[Answer]]:
        place, messages = read_back(text)
        try:
            return self.renderer.answers(messages)
        except ValueError as error:
            raise ValueError(
                f"{place}: the chat template of data.tokenizer_name_or_path fails: {error}"
            ) from error

    def _ids(self, ids: np.ndarray, places: np.ndarray, found: list[Answer]) -> list[int]:
        """ids [n], places [n, 2] in the text -> ids with SCORED, filled."""
        scored = scored_tokens(places, np.isin(ids, self.special), found)
        stop = int(np.flatnonzero(scored)[-1]) + 1
        ids = [*np.where(scored, ids | SCORED, ids)[:stop].tolist()]
        if not np.isin(ids[-1] & ~SCORED, self.special):
            ids.append(self.tokenizer.eos_id | SCORED)
        fill = self.tokenizer.eos_id | SCORED if self.train else self.tokenizer.mask_id
        ids += [fill] * (-len(ids) % self.align)
        return ids if len(ids) <= self.length else []


def scored_tokens(places: np.ndarray, special: np.ndarray, found: list[Answer]) -> np.ndarray:
    """Which tokens are of an answer, boolean [n]. places [n, 2]: where each begins and ends in the
    text; special [n]: whether it is no text."""
    begins, ends = places.T
    scored = np.zeros(len(places), bool)
    for begin, content, marked, end in found:
        closing = np.flatnonzero(special & (begins >= content) & (begins < end))
        stop = ends[closing[0]] if len(closing) else end
        scored |= (ends > begin) & (begins < max(stop, marked))
    return scored
