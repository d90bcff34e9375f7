"""Quality of texts without a reference: perplexity under a judge, unigram entropy, length.

The judge is any causal language model, one of this project included. A text is tokenized for the
judge, seen in windows of the judge's context that move by 512 tokens, or by half of a context that
is shorter than 1 024, and every token but the first is scored once, with all that its window shows
before it. EOS tokens are context but not counted. Where the rows that a judge was trained on begin
with BOS, so do a text and its windows: without it such a network is far from what it knows.
Entropy is that of the frequencies of all the text's tokens, in nats; length counts the tokens
scored.
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpointing.checkpoint import fingerprint
from checkpointing.restricted_pickle import CheckpointError
from data.trial import TEXTS, tried, unheard
from evaluation.judge_files import check_judge
from evaluation.own_judge import is_own, load_own
from samplers.params import CONTEXT_TOKENS
from samplers.stopping import entropy
from utils import check_files, reason

STRIDE_TOKENS = 512


@dataclass(frozen=True)
class TextScore:
    """One text. `nll` is None without a judge."""

    nll: float | None  # in nats, over the tokens scored
    tokens: int  # scored: all but the first and EOS
    entropy: float  # nats

    @property
    def perplexity(self) -> float:
        if self.nll is None or self.tokens == 0:
            return math.nan
        return math.exp(min(self.nll / self.tokens, 700))


def describe(ids: Sequence[int] | Tensor, eos_id: int, nll: float | None = None) -> TextScore:
    ids = torch.as_tensor(ids, dtype=torch.int64)
    scored = int((ids[1:] != eos_id).sum())
    return TextScore(nll, scored, entropy(ids))


@dataclass(frozen=True)
class Window:
    """Tokens start .. stop - 1 of a text; those from `scored` on are scored here."""

    text: int
    start: int
    stop: int
    scored: int


def windows(lengths: Sequence[int], context: int, stride: int, bos: int = 0) -> list[Window]:
    """Every token but the first of each text is scored in exactly one window; bos: tokens that are
    put in front of all but its first window."""
    found = []
    for text, length in enumerate(lengths):
        start, scored = 0, 1
        while scored < length:
            stop = min(start + context - (bos if start else 0), length)
            found.append(Window(text, start, stop, scored))
            start, scored = start + stride, stop
    return found


class Judge:
    """A causal language model with its tokenizer.

    `foreign`: special tokens of the writer ("[CLS]"), which are shown to the judge as its own EOS
    where its vocabulary does not have them. `bos_id`: what begins each row of its training, if
    anything does.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        context: int,
        batch_size: int = 8,
        stride: int = STRIDE_TOKENS,
        foreign: Sequence[str] = (),
        bos_id: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"eval.perplexity_batch_size={batch_size} must be at least 1")
        self.model, self.tokenizer = model.eval(), tokenizer
        # a window that moved further would leave its first token without any before it
        self.context, self.stride = context, min(stride, max(1, context // 2))
        self.batch_size = batch_size
        self.bos = torch.tensor([] if bos_id is None else [bos_id], dtype=torch.int64)
        self.foreign = self._unknown(foreign)

    def _unknown(self, tokens: Sequence[str]) -> list[str]:
        known = self.tokenizer.get_vocab()
        return [token for token in tokens if token not in known]

    def of_writer(self, foreign: Sequence[str]) -> "Judge":
        """The same network for texts with these special tokens."""
        other = copy.copy(self)
        other.foreign = self._unknown(foreign)
        return other

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        found = []
        for text in texts:
            for token in self.foreign:
                text = text.replace(token, self.tokenizer.eos_token)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = torch.tensor(ids, dtype=torch.int64)
            begun = torch.equal(ids[: len(self.bos)], self.bos)
            found.append(ids if begun else torch.cat([self.bos, ids]))
        return found

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One score per text, in order; windows of several texts share a batch."""
        return self.score_tokens(self.tokenize(texts))

    def score_tokens(self, ids: list[Tensor]) -> list[TextScore]:
        nll = [0.0] * len(ids)
        todo = windows([len(x) for x in ids], self.context, self.stride, len(self.bos))
        counted = [x != self.eos_id for x in ids]
        todo = [w for w in todo if counted[w.text][w.scored : w.stop].any()]
        todo.sort(key=lambda w: w.start - w.stop)  # long ones together: little padding
        for first in range(0, len(todo), self.batch_size):
            batch = todo[first : first + self.batch_size]
            for window, value in zip(batch, self._nll(ids, batch), strict=True):
                nll[window.text] += value
        return [describe(x, self.eos_id, n) for x, n in zip(ids, nll, strict=True)]

    @torch.inference_mode()
    def last_states(self, ids: list[Tensor]) -> Tensor:
        """The last hidden state of the last token of each text, float32 [N, E] on the CPU. A text
        is cut at the judge's context; an empty one is EOS alone."""
        end = torch.tensor([self.eos_id])
        texts = [x[: self.context] if len(x) else end for x in ids]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        device, found = next(self.model.parameters()).device, {}
        for first in range(0, len(order), self.batch_size):
            part = order[first : first + self.batch_size]
            tokens = pad_sequence([texts[i] for i in part], True, self.eos_id)
            lengths = torch.tensor([len(texts[i]) for i in part])
            seen = torch.arange(tokens.shape[1]) < lengths[:, None]
            states = self.model.base_model(
                input_ids=tokens.to(device), attention_mask=seen.long().to(device)
            ).last_hidden_state
            last = states[torch.arange(len(part)), lengths - 1].float().cpu()
            found.update(zip(part, last, strict=True))
        return torch.stack([found[i] for i in range(len(texts))])

    @cached_property
    def fingerprint(self) -> str:
        """Other weights, other name: 16 hex digits."""
        return fingerprint(self.model.state_dict())

    def _shown(self, ids: Tensor, w: Window) -> Tensor:
        bos = self.bos if w.start else self.bos[:0]
        return torch.cat([bos, ids[w.start : w.stop].long()])

    @torch.inference_mode()
    def _nll(self, ids: list[Tensor], batch: list[Window]) -> list[float]:
        """NLL in nats of the tokens scored in each window."""
        shown = [self._shown(ids[w.text], w) for w in batch]
        tokens = pad_sequence(shown, True, self.eos_id)
        ends = torch.tensor([len(x) for x in shown])[:, None]
        begins = ends - torch.tensor([w.stop - w.scored for w in batch])[:, None]
        place = torch.arange(tokens.shape[1])
        seen, loss_mask = (place < ends).long(), ((begins <= place) & (place < ends)).float()
        loss_mask *= tokens != self.eos_id
        device = next(self.model.parameters()).device
        tokens, seen, loss_mask = tokens.to(device), seen.to(device), loss_mask.to(device)
        logits = self.model(input_ids=tokens, attention_mask=seen).logits[:, :-1]
        values = torch.stack(
            [  # row by row: a second [B, T, V] tensor would not fit beside a large judge
                (F.cross_entropy(row.float(), after, reduction="none") * weight).double().sum()
                for row, after, weight in zip(logits, tokens[:, 1:], loss_mask[:, 1:], strict=True)
            ]
        )
        return values.tolist()


def _check_vocabulary(tokenizer, model) -> None:
    """ValueError where text has no ids, as without a tokenizer.json, or ids that the model lacks:
    transformers takes both, and the texts would have no perplexity."""
    ids = [id for text in TEXTS for id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = model.get_input_embeddings().num_embeddings
    if not ids:
        raise ValueError("its tokenizer gives no ids: tokenizer.json or the like is not there")
    if max(ids) >= rows:
        raise ValueError(f"its tokenizer gives the id {max(ids)}, the model has {rows}")


def load_judge(
    name_or_path: str,
    *,
    batch_size: int = 8,
    device="cpu",
    foreign: Sequence[str] = (),
    setting: str = "eval.gen_ppl_eval_model_name_or_path",
    cache_dir: str | Path | None = None,
) -> Judge:
    """A folder, a hub id or an autoregressive checkpoint of this project; nothing of it is
    executed, and no weight may be missing. setting: what messages call it; cache_dir: see
    get_tokenizer."""
    try:
        model, tokenizer, context, bos_id = _load(name_or_path, cache_dir)
    except CheckpointError as error:  # says what it is
        raise ValueError(
            f"{setting}={name_or_path!r} cannot be used ({reason(error)[:400]}). Give an ar"
            " checkpoint of this project, or the folder or hub id of a causal language model"
        ) from error
    except Exception as error:  # transformers and torch raise anything for what is in the files
        raise ValueError(
            f"{setting}={name_or_path!r} cannot be loaded"
            f" ({type(error).__name__}, {reason(error)[:160]}). Give the"
            " folder of a causal language model, an ar checkpoint of this project, go online once"
            " so that the hub's files are cached, or set it to null to leave generative perplexity"
            " out"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of the judge {name_or_path!r} has no EOS token, which must not be"
            f" counted: choose another {setting}"
        )
    return Judge(
        model.to(device),
        tokenizer,
        context=context,
        batch_size=batch_size,
        foreign=foreign,
        bos_id=bos_id,
    )


def _load(name_or_path: str, cache_dir: str | Path | None):
    """The network, its tokenizer, the tokens it sees, and the BOS that begins its rows or None."""
    if Path(name_or_path).is_dir():
        check_files(Path(name_or_path))
    elif os.path.lexists(name_or_path) and not os.path.isfile(name_or_path):
        raise ValueError("it is no regular file")
    if is_own(name_or_path):
        return load_own(name_or_path, cache_dir)
    return _load_foreign(name_or_path)


def _load_foreign(name_or_path: str):
    """A model of transformers, without BOS, as published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with unheard():
        if Path(name_or_path).is_dir():
            check_judge(Path(name_or_path))
            tried(Path(name_or_path), trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it is refused here, and transformers prints a page
        )
    if other := sorted(name for name, *_ in found["mismatched_keys"]):
        raise ValueError(f"its config.json asks for other shapes of {', '.join(other[:5])}")
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"its files lack {', '.join(missing[:5])}")
    context = getattr(model.config, "max_position_embeddings", None) or CONTEXT_TOKENS
    if type(context) is not int or context < 2:
        raise ValueError(f"its max_position_embeddings is {context!r:.40}")
    _check_vocabulary(tokenizer, model)
    return model, tokenizer, context, None
