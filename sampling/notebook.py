"""For notebooks: a checkpoint that writes, in three lines.

    from sampling.notebook import load
    writer = load("outputs/…/checkpoints/last.ckpt")
    out = writer.generate(["To be, or", "My lord,"], length=256, nucleus_p=0.9)

    writer.nll(["To be, or not to be"], likelihood="exact")[0].total  # nats
    writer.log_probs(ids)  # at the masks of ids
    writer.hidden_states(ids)

`out.texts`, `out.samples` and `out.scores` are in the order of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointing.layouts import ALIASES, Checkpoint, read_checkpoint
from checkpointing.trained import trained_network, trained_tokenizer
from evaluation.judge import Judge, TextScore, describe
from noise_schedule import get_schedule
from objectives.algorithms import ObjectiveSettings, build_objective, get_algorithm
from samplers.params import CONTEXT_TOKENS, SamplingParams, whole_blocks
from samplers.request import Sample
from samplers.writing import SAMPLERS, check, generate
from sampling.prompts import encode_prompts
from sampling.reading import Reading
from sampling.run import Model, Texts, visible_tokens


@dataclass(frozen=True)
class Written:
    """Texts, what the sampler says of each, and its figures, in the order of the prompts."""

    texts: list[str]
    samples: list[Sample]
    scores: list[TextScore]


@dataclass(frozen=True)
class Writer(Model, Reading):
    """A loaded model. `params` are what `generate` starts from."""

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        infill: bool = False,
        judge: Judge | None = None,
        watch=None,
        **changes,
    ) -> Written:
        """One text per prompt. `changes`: fields of SamplingParams (length, nucleus_p, seed …).
        ValueError where one is unknown or cannot be."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self.params.changed(**({"batch_size": max(1, len(prompts))} | changes))
        check(params, self.writes, infill)
        found = encode_prompts(
            prompts,
            self.tokenizer,
            infill=infill,
            length=params.length,
            context_size=visible_tokens(self.algo, params),
        )
        texts = Texts(len(found), found, infill)
        requests = [texts.request(row, params.bos_id) for row in range(texts.count)]
        groups = generate(
            self.writes, self.denoise, requests, params, device=self.device, watch=watch
        )
        samples = sorted((s for group in groups for s in group), key=lambda s: s.row)
        texts = [self.tokenizer.decode(s.tokens.tolist()) for s in samples]
        scores = [describe(s.tokens, params.eos_id) for s in samples]
        return Written(texts, samples, scores if judge is None else judge.score(texts))


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
    need not be said again.

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
    return Writer(algo, denoise, words, base.changed(**params), device)


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
    )
