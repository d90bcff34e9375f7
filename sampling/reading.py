"""What a loaded model thinks of given texts: likelihoods, probabilities, hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.scoring import ScoredText, Scorer
from models.masks import Full


class Reading:
    """The methods that `Writer` has beside `generate`."""

    @property
    def scorer(self) -> Scorer:
        denoise, writes = self.denoise, self.writes
        size = 1 if writes in ("ar", "sedd") else denoise.block_size
        length = self.params.context_size if writes != "mdlm" else size
        seed = self.params.seed
        return Scorer(writes, denoise.backbone, denoise.mask_id, size, length, self.device, seed)

    def nll(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        likelihood: str | None = None,
        draws: int = 1,
        max_passes: int = 1024,
        batch_size: int = 16,
    ) -> list[ScoredText]:
        """One result per text: `.nll` per token, `.total` and `.tokens` per text, in nats.

        texts: words, or ids that begin with BOS; the first token is never scored. likelihood: a
        name that mode=ppl_eval knows, such as exact, counts, greedy or iw:8; None: exact in blocks
        of at most 10 tokens, else counts. ValueError where the model has none of that name or it
        takes more than `max_passes` passes.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        bos = self.tokenizer.bos_id
        ids = [
            [bos, *self.tokenizer.encode(t)] if isinstance(t, str) else [int(i) for i in t]
            for t in texts
        ]
        chosen = self.scorer.parse(likelihood, draws, max_passes)
        return self.scorer.score(ids, [1] * len(ids), chosen, draws=draws, batch_size=batch_size)

    @torch.no_grad()
    def log_probs(self, ids, positions: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities float32 [B, R, V] of what may stand at `positions` (R of them; None:
        all masked ones, as many in each row). ids [B, T] or [T]; [MASK] is tokenizer.mask_id, seen
        as such. Of ar: given the tokens to the left, so position 0 has none. ValueError where a
        position is not one of ids."""
        tokens = self._tokens(ids)
        if self.writes == "sedd":
            raise ValueError("sedd has scores at a noise level, no probabilities of tokens")
        if positions is None:
            masked = tokens == self.tokenizer.mask_id
            if len(masked.sum(1).unique()) > 1:
                raise ValueError("the rows have different numbers of masks: give positions")
            read = masked.nonzero()[:, 1].view(len(tokens), -1)
        else:
            read = torch.as_tensor(positions, device=tokens.device).expand(len(tokens), -1)
        if bool(((read < 0) | (read >= tokens.shape[1])).any()):
            raise ValueError(f"positions={positions} must be in 0..{tokens.shape[1] - 1}")
        if self.writes == "ar":
            if bool((read < 1).any()):
                raise ValueError("ar predicts no token at position 0")
            read = read - 1
        return self.denoise(tokens, read)

    @torch.no_grad()
    def hidden_states(self, ids) -> list[Tensor]:
        """[B, T, E] each: the embedding of ids [B, T] or [T] and what every block adds up to, the
        last being what the head normalises. Blocks see themselves and those before; of mdlm and
        sedd all is seen, of sedd at noise level 0."""
        tokens = self._tokens(ids)
        mask = Full() if self.writes == "sedd" else self.denoise.attention_mask
        with self.denoise.backbone.states() as states:
            self.denoise.backbone.hidden(tokens, attention_mask=mask)
        return states

    def _tokens(self, ids) -> Tensor:
        """ids [B, T] or [T] as int64 [B, T]."""
        tokens = torch.as_tensor(ids, device=self.device)
        if tokens.numel() == 0:
            raise ValueError("ids must have at least one token")
        return tokens[None] if tokens.dim() == 1 else tokens
