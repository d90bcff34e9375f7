"""For notebooks: a checkpoint that writes, in three lines.

    from sampling.notebook import load
    writer = load("outputs/…/checkpoints/last.ckpt")
    out = writer.generate(["To be, or", "My lord,"], length=256, nucleus_p=0.9)

    writer.nll(["To be, or not to be"], likelihood="exact")[0].total  # nats
    writer.log_probs(ids)  # at the masks of ids
    writer.hidden_states(ids)

`out.texts`, `out.samples` and `out.scores` are in the order of the prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpointing.checkpoint import Checkpoint
from checkpointing.layouts import ALIASES, read_checkpoint
from checkpointing.load import say_untrained, trained_sizes
from checkpointing.trained import trained_network, trained_tokenizer
from evaluation.judge import Judge, TextScore, describe
from evaluation.scoring import ScoredText, Scorer
from models.adaptation import PLAIN, Adaptation
from models.masks import Full
from noise_schedule import get_schedule
from objectives.algorithms import ObjectiveSettings, build_objective, get_algorithm
from samplers.params import CONTEXT_TOKENS, SamplingParams, whole_blocks
from samplers.request import Sample
from samplers.writing import SAMPLERS, generate
from sampling.run import Model, Texts


@dataclass(frozen=True)
class Written:
    """Texts, what the sampler says of each, and its figures, in the order of the prompts."""

    texts: list[str]
    samples: list[Sample]
    scores: list[TextScore]


@dataclass(frozen=True)
class Writer(Model):
    """A loaded model: `generate` writes, the other methods read given texts. `params` are what both
    start from. `trained`: the block sizes of its training, where they are known."""

    trained: tuple[int, ...] = ()

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        infill: bool = False,
        judge: Judge | None = None,
        watch=None,
        **changes,
    ) -> Written:
        """One text per prompt. `changes`: fields of SamplingParams (length, nucleus_p, seed …), of
        bamdlm any block_size too. ValueError where one is unknown or cannot be."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self.asked({"batch_size": max(1, len(prompts))} | changes)
        if params.block_size != self.params.block_size and self.writes == "bamdlm":
            say_untrained(self.trained, [params.block_size])
        found = self.encode(prompts, params, infill)
        texts = Texts(len(found), found, infill)
        requests = [texts.request(row, params.bos_id) for row in range(texts.count)]
        groups = generate(
            self.writes, self.denoiser(params), requests, params, device=self.device, watch=watch
        )
        samples = sorted((s for group in groups for s in group), key=lambda s: s.row)
        texts = [self.tokenizer.decode(s.tokens.tolist()) for s in samples]
        scores = [describe(s.tokens, params.eos_id) for s in samples]
        return Written(texts, samples, scores if judge is None else judge.score(texts))

    def asked(self, changes: dict) -> SamplingParams:
        """`params` with other values; of blocks of another size the context is whole ones."""
        params = self.params.changed(**changes)
        size = params.block_size
        if self.writes != "bamdlm" or size < 1 or size == self.params.block_size:
            return params
        context = changes.get("context_size", whole_blocks(params.context_size, size))
        return params.changed(context_size=context)

    def denoiser(self, params: SamplingParams) -> Callable:
        """What a sampler with these `params` asks."""
        if self.writes != "bamdlm":
            return self.denoise
        return self.denoise.in_blocks(params.block_size)

    @property
    def scorer(self) -> Scorer:
        denoise, writes = self.denoise, self.writes
        size = 1 if writes in ("ar", "sedd") else denoise.block_size
        length = self.params.context_size if writes != "mdlm" else size
        shared = writes, denoise.backbone, denoise.mask_id, size, length, self.device
        adapt = PLAIN if writes == "sedd" else denoise.adapt
        return Scorer(*shared, self.params.seed, adapt)

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
        elif self.denoise.shifted and bool((read < 1).any()):
            raise ValueError("with adapt.label=next no token is predicted at position 0")
        return self.denoise(tokens, read)

    @torch.no_grad()
    def hidden_states(self, ids) -> list[Tensor]:
        """[B, T, E] each: the embedding of ids [B, T] or [T] and what every block adds up to, the
        last being what the head normalises. Blocks see themselves and those before; of mdlm and
        sedd all is seen, of sedd at noise level 0."""
        tokens = self._tokens(ids)
        seen = {"attention_mask": Full()} if self.writes == "sedd" else self.denoise.seen(tokens)
        with self.denoise.backbone.states() as states:
            self.denoise.backbone.hidden(tokens, **seen)
        return states

    def _tokens(self, ids) -> Tensor:
        """ids [B, T] or [T] as int64 [B, T]."""
        tokens = torch.as_tensor(ids, device=self.device)
        if tokens.numel() == 0:
            raise ValueError("ids must have at least one token")
        return tokens[None] if tokens.dim() == 1 else tokens


def load(
    checkpoint: str | Path | Checkpoint,
    *,
    tokenizer: str | None = None,
    algo: str | None = None,
    block_size: int | None = None,
    use_ema: bool = True,
    device="cpu",
    cache_dir: str | None = None,
    **params,
) -> Writer:
    """A .ckpt, an exported folder or a hub id, or one that was read. What the file says of itself
    need not be said again. A block size at which it was not trained is used, with a note.

    use_ema: the averaged weights, which must be there, or else the raw ones. `params`: fields of
    SamplingParams, as the defaults of `generate`. The cache is on where it is exact.
    """
    found = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    algo, block_size = trained_as(found, algo, block_size)
    words = trained_tokenizer(found, tokenizer, cache_dir)
    network = trained_network(found, words, algo, use_ema)
    settings = objective_settings(found, words.mask_id, block_size)
    length, schedule = settings.length, settings.schedule
    denoise = build_objective(algo, settings).denoiser(network.to(device).eval())
    base = SamplingParams(
        length=length,
        bos_id=words.bos_id,
        eos_id=words.eos_id,
        block_size=block_size,
        context_size=length,
        window=length,
        kv_cache="cache" in SAMPLERS[get_algorithm(algo).writes].can,
        move_chance=lambda t: schedule(t).p,
    )
    trained = trained_sizes(found, algo)
    say_untrained(trained, [block_size])
    return Writer(algo, denoise, words, base.changed(**params), device, trained)


def trained_as(found: Checkpoint, algo: str | None, size: int | None) -> tuple[str, int]:
    """Algorithm and block size, 1 where it has no blocks. ValueError where nobody says them."""
    algo = ALIASES.get(algo, algo) or found.algo
    if algo is None:
        choice = " and ".join(found.algorithms)
        raise ValueError(f"{found.source} fits {choice}: say which as algo=")
    size = size or (found.block_size if get_algorithm(algo).blocks else 1)
    if size is None:
        raise ValueError(f"{found.source} does not say its block size: give block_size=")
    return algo, size


def objective_settings(found: Checkpoint, mask_id: int, block_size: int) -> ObjectiveSettings:
    """What decides how the network's logits are read when it samples."""
    return ObjectiveSettings(
        mask_id,
        get_schedule(found.noise, bool(found.algo_settings.get("mdlm_loss_scale"))),
        block_size,
        whole_blocks(found.length or CONTEXT_TOKENS, block_size),
        time_conditioning=found.algo_settings.get("time_conditioning", True),
        adapt=Adaptation.named(**found.adapt),
    )
