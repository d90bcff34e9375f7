"""Likelihoods of given texts: for notebooks and lm-eval.

A text is a list of ids, of which the first ones may be given (a prompt, BOS). It need not fill its
last block: the places behind it are masked and stay so, as for a sampler that has not come so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.estimators import AskedTexts, Chance, Path, greedy_path
from evaluation.network import asker, reduced
from evaluation.table import Chosen, check_likelihoods, parse_likelihood
from models.adaptation import PLAIN, Adaptation
from models.masks import Causal
from utils import digest

EXACT_TOKENS = 10  # of a block: 1 023 passes


@dataclass(frozen=True)
class ScoredText:
    """`nll` float64 [n] of each token in nats, 0 where it was given; blocks whose likelihood has no
    parts (first_hitting, iw) share it out equally. `greedy`: whether the greedy rule would have
    written all that was not given; None where nobody asked."""

    nll: Tensor
    tokens: int  # that were scored: all that were not given, but masks
    greedy: bool | None = None

    @property
    def total(self) -> float:
        return float(self.nll.sum())


class Alone(Chance):
    """The blocks of a text share no strata, so that its padding does not matter."""

    def strata(self, blocks: Tensor) -> Tensor:
        return self.times(blocks)


@dataclass(frozen=True)
class Scorer:
    """`block_size`: 1 for ar, the whole length for mdlm. `length`: tokens the network was trained
    on, which no text may exceed."""

    algo: str
    backbone: torch.nn.Module
    mask_id: int
    block_size: int
    length: int
    device: torch.device | str = "cpu"
    seed: int = 1
    adapt: Adaptation = PLAIN

    def parse(self, label: str | None, draws: int = 1, most: int = 1024) -> Chosen:
        """None: exact in blocks of at most EXACT_TOKENS, else counts. ValueError where the model
        has no such likelihood, or it takes too many passes."""
        usual = "exact" if self.block_size <= EXACT_TOKENS else "counts"
        chosen = parse_likelihood(label or usual)
        if self.algo == "sedd":
            raise ValueError(
                "the likelihood of given texts is not defined for sedd, whose network is told the"
                " noise level: mode=ppl_eval has its bound"
            )
        limits = {"algo": self.algo, "block_size": self.block_size}
        check_likelihoods([chosen], **limits, draws=draws, most=most)
        return chosen

    def score(
        self,
        texts: Sequence[Sequence[int]],
        given: Sequence[int],
        chosen: Chosen,
        *,
        draws: int = 1,
        greedy: bool = False,
        batch_size: int = 16,
        tick: Callable[[int], object] = lambda texts: None,
    ) -> list[ScoredText]:
        """`given`: how many tokens of each text are not scored, at least 1. Batches are of similar
        length, the longest first; `tick` hears how many texts each had. ValueError where a text
        has no token, one that is none of the model's, or too many."""
        if min(draws, batch_size) < 1:
            raise ValueError(f"draws={draws} and batch_size={batch_size} must be at least 1")
        self._check(texts)
        order, found = sorted(range(len(texts)), key=lambda i: -len(texts[i])), {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = [texts[i] for i in part], [given[i] for i in part]
            if self.algo == "ar":
                path = self._next_tokens(*batch)
                nll = path.nll
            else:
                nll, path = self._in_blocks(*batch, chosen, draws, greedy)
            written = path.likeliest.all(1).tolist() if greedy else [None] * len(part)
            for i, of_text, likeliest in zip(part, nll.cpu(), written, strict=True):
                size, masks = len(texts[i]), list(texts[i][given[i] :]).count(self.mask_id)
                found[i] = ScoredText(of_text[:size], size - given[i] - masks, likeliest)
            tick(len(part))
        return [found[i] for i in range(len(texts))]

    def _check(self, texts: Sequence[Sequence[int]]) -> None:
        room = self.length + (self.algo == "ar")  # whose last token is only predicted
        for text in texts:
            if len(text) == 0 or min(text) < 0 or max(text) >= self.backbone.vocab_size:
                raise ValueError(
                    f"a text must be ids in 0..{self.backbone.vocab_size - 1} that begin with BOS,"
                    f" got {list(text[:8])}"
                )
            if len(text) > room:
                raise ValueError(f"a text has {len(text)} tokens with BOS, the model takes {room}")

    def _padded(self, texts, given, width: int) -> tuple[Tensor, Tensor]:
        """Ids with masks behind them, and which are scored, masks left out: [B, width] each."""
        x0 = torch.full((len(texts), width), self.mask_id)
        scored = torch.zeros_like(x0, dtype=torch.bool)
        for i, text in enumerate(texts):
            x0[i, : len(text)] = torch.tensor(text)
            scored[i, given[i] : len(text)] = True
        return x0.to(self.device), (scored & (x0 != self.mask_id)).to(self.device)

    @torch.no_grad()
    def _in_blocks(self, texts, given, chosen: Chosen, draws: int, greedy: bool):
        longest = max(map(len, texts))
        x0, scored = self._padded(texts, given, -(-longest // self.block_size) * self.block_size)
        asked = AskedTexts(x0, scored, self.block_size, self.mask_id)
        ask = asker(
            self.backbone,
            x0,
            block_size=self.block_size,
            mask_id=self.mask_id,
            adapt=self.adapt,
        )
        greedy = greedy or chosen.label == "greedy"
        path = greedy_path(ask, asked) if greedy else None
        if chosen.label == "greedy":
            return path.nll, path
        if not chosen.kind.sampled:
            return chosen.estimate(ask, asked), path
        # numbers that follow from the text alone, whatever the batch
        rows = torch.tensor([int(digest(str(list(text)), 8), 16) for text in texts])
        chances = [Alone(self.seed + (draw << 32), rows, 1) for draw in range(draws)]
        return sum(chosen.estimate(ask, asked, each) for each in chances) / draws, path

    @torch.no_grad()
    def _next_tokens(self, texts, given) -> Path:
        x0, scored = self._padded(texts, given, max(map(len, texts)))
        hidden = self.backbone.hidden(x0[:, :-1], attention_mask=Causal())
        read = scored[:, 1:].flatten().nonzero()[:, 0]
        targets, states = x0[:, 1:].flatten()[read], hidden.flatten(0, 1)[read]
        nll = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        likeliest = torch.ones_like(scored)
        picked, best = reduced(self.backbone, states, targets, self.mask_id, _picked).unbind(-1)
        where = (read // (x0.shape[1] - 1), read % (x0.shape[1] - 1) + 1)
        nll[where], likeliest[where] = -picked.double(), picked == best
        return Path(nll, likeliest)


def _picked(log_p: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of the targets, and the greatest: [m, 2]."""
    return torch.stack([log_p.gather(1, targets[:, None])[:, 0], log_p.amax(1)], -1)
