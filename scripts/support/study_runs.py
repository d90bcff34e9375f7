"""The trainings of the study, and the words of their commands."""

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.support.study_report import RECIPE

LENGTH = 128
WARMUP = 200  # steps; a tenth of a run that is shorter than 2,000
BASE = (
    *("wandb=null", "lr_scheduler=cosine_decay_warmup"),
    *("data.insert_train_special=false", "data.insert_valid_special=false"),
    *("loader.global_batch_size=64", "loader.eval_global_batch_size=128", "loader.num_workers=1"),
    *(f"model.length={LENGTH}", "model.hidden_size=256", "model.cond_dim=128", "model.n_blocks=6"),
    *("model.n_heads=8", "model.dropout=0.1", "optim.lr=1e-3", "training.ema=0.999"),
    *("trainer.log_every_n_steps=50", "trainer.num_sanity_val_steps=0"),
    *("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    *("trainer.devices=1", "model.attn_backend=sdpa"),
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=500",
)
SIZES = "sizes"  # one network for all
SEARCH = ("algo.var_min=true", "algo.clip_search_widths=[0.5,0.6,0.7,0.8,0.9]")
# name: its settings. A variant more is one line here.
VARIANTS = {
    "full": (),
    RECIPE: ("training.resample=true", *SEARCH),
    "counts": ("training.noise=counts",),
    "counts-learnt": ("training.noise=counts", "training.count_law=learnt"),
    "counts-range": ("training.noise=counts", *SEARCH),
    "views": ("training.noise=counts", "training.views=2"),
    "muon": ("training.noise=counts", "optim=muon"),
    SIZES: ("training.noise=counts",),
}
WHOLE = "L"  # a block of the whole row: the objective of mdlm
NEEDS_BLOCKS = ("views",)  # not at WHOLE
BESIDE = {  # without blocks or variants
    "ar": ("algo=ar", "block_size=1"),
    "sedd": ("algo=sedd",),
    "sedd-no-time": ("algo=sedd", "algo.time_conditioning=false"),
}


@dataclass(frozen=True)
class Run:
    """One training, and its evaluation at each of `sizes`; () beside. The first is that of its
    own validations."""

    corpus: str
    sizes: tuple[str, ...]
    variant: str
    seed: int
    steps: int
    timed: bool = False  # of as many steps as fit the recipe's time

    @property
    def name(self) -> str:
        size = f"S{self.sizes[0]}-" if self.sizes and self.variant != SIZES else ""
        timed = "-equal-time" if self.timed else ""
        return f"{self.corpus}-{size}{self.variant}-seed{self.seed}{timed}"

    def words(self, more: Sequence[str] = (), size: str | None = None) -> list[str]:
        """size: that of an evaluation."""
        chosen = [*BESIDE.get(self.variant, ())]
        if self.sizes:
            asked = [tokens(each) for each in self.sizes]
            at = tokens(size or self.sizes[0])
            chosen = ["algo=bamdlm", f"block_size={at}", *VARIANTS[self.variant]]
            if self.variant == SIZES:
                shares = ", ".join(f"{each}: {1 / len(asked):.4f}" for each in asked)
                chosen.append(f"training.block_sizes={{{shares}}}")
        tenth = self.steps // 10  # ten validations
        steps = (
            f"trainer.max_steps={self.steps}",
            f"trainer.val_check_interval={max(1, tenth)}",
            f"lr_scheduler.num_warmup_steps={min(WARMUP, tenth)}",
        )
        return [f"data={self.corpus}", *BASE, *steps, *chosen, f"seed={self.seed}", *more]

    def evaluations(self) -> dict[str, list[str]]:
        """{size: the words of its evaluation}; the key "" beside."""
        if not self.sizes:
            return {"": ["eval.draws=8"] if self.variant.startswith("sedd") else []}
        exact, drawn = ["eval.likelihood=exact"], ["eval.draws=8"]
        return {size: exact if tokens(size) <= 4 else drawn for size in self.sizes}


def tokens(size: str) -> int:
    return LENGTH if size == WHOLE else int(size)


def trainings(variant: str, sizes: Sequence[str]) -> list[tuple[str, ...]]:
    """The block sizes of each training of a variant."""
    if variant in BESIDE:
        return [()]
    if variant == SIZES:
        return [tuple(sizes)]
    return [(size,) for size in sizes if size != WHOLE or variant not in NEEDS_BLOCKS]
