"""The schema of a run: every setting with its type and what it means.

The values are in configs/ (config.yaml and one file per choice of a group); a test holds the two
together. In the YAML files null means "chosen when the run starts"; where the type here has no
None, config.load has chosen. A device is a GPU, or a process on a CPU. S = block_size, L =
model.length.
"""

# ruff: noqa: RUF009  doc() is dataclasses.field

from dataclasses import dataclass, field

from settings.limits import (
    ABOVE_0,
    ABOVE_0_UP_TO_1,
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_MINUS_1,
    BATCHES,
    BATCHES_OR_SHARE,
    BETWEEN_0_AND_1,
    DURATION,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    SEED,
    SHARES,
    Limit,
    one_of,
)
from settings.tables import attention_backends, confidences, modes, schedules, step_rules


def doc(text: str, limit: Limit | None = None):
    """A required setting: what --help says about it, and what it may be beside its type."""
    return field(metadata={"doc": text, "limit": limit})


@dataclass
class Loader:
    global_batch_size: int = doc("sequences per optimizer step, all devices together", AT_LEAST_1)
    eval_global_batch_size: int = doc(
        "sequences per evaluation batch, all devices together", AT_LEAST_1
    )
    batch_size: int = doc(
        "sequences per device and pass; null: global / devices; rest accumulates", AT_LEAST_1
    )
    eval_batch_size: int = doc(
        "the same for evaluation and sampling; null: global / devices", AT_LEAST_1
    )
    num_workers: int = doc("processes that prepare and load data; null: one per core", AT_LEAST_0)
    pin_memory: bool = doc("page-locked host memory, for GPUs")


@dataclass
class Sampling:
    num_sample_batches: int = doc(
        "batches of samples to draw; each has sampling.batch_size rows", AT_LEAST_1
    )
    batch_size: int = doc(
        "samples drawn together per device; null: loader.eval_batch_size", AT_LEAST_1
    )
    var_length: bool = doc("stop a sample at EOS or at low entropy, and cut it there")
    logdir: str = doc("where the CSV of samples is written")
    nucleus_p: float = doc(
        "keep tokens whose cumulative probability is <= p, in (0, 1]", ABOVE_0_UP_TO_1
    )
    first_hitting: bool = doc("reveal one token per step at its exact time; false: ancestral")
    steps: str | None = doc(
        "which tokens a step reveals; null: as sampling.first_hitting says", one_of(*step_rules())
    )
    confidence: str = doc("how steps=confidence ranks the positions", one_of(*confidences()))
    k: int = doc("tokens that steps=confidence reveals at a time", AT_LEAST_1)
    threshold: float = doc(
        "steps=threshold reveals all above this probability, at least one", ABOVE_0_UP_TO_1
    )
    remask_eta: float = doc(
        "largest chance that steps=remask hides a token again, in [0, 1]", FROM_0_TO_1
    )
    kv_cache: bool = doc("exact key-value cache (ar, bamdlm)")
    context_size: int | None = doc(
        "visible tokens, current block included, a multiple of S; null: trained length, else 1024",
        AT_LEAST_1,
    )
    dtype: str = doc("number format of the draw", one_of("float32", "float64"))
    prompt: str | None = doc("text that every sample begins with")
    prompts: str | None = doc("file of prompts: .txt, one per line, or .jsonl with `prompt`")
    infill: bool = doc("fill the [MASK] runs of the prompts")
    reject_low_entropy: bool = doc("draw again at low entropy, as the authors did (up to 10 times)")
    show: bool = doc("draw the text in the terminal as it is denoised")
    trajectory: str | None = doc("an .html file that replays the denoising")


@dataclass
class Training:
    ema: float = doc(
        "decay of the average of the weights, in [0, 1); 0 turns it off", FROM_0_BELOW_1
    )
    antithetic_sampling: bool = doc("stratify the noise levels over the global batch")
    sampling_eps: float = doc(
        "lower end of the full interval of t: validation, clip search", BETWEEN_0_AND_1
    )
    sampling_eps_min: float = doc("lower end of the interval of t in training", ABOVE_0_UP_TO_1)
    sampling_eps_max: float = doc("upper end of the interval of t in training", ABOVE_0_UP_TO_1)
    resample: bool = doc("keep each block's masked share inside [eps_min, eps_max]")
    from_pretrained: str | None = doc("start from these weights: .ckpt, exported folder or hub id")
    eval_nll: bool = doc("with S = 1, validate the exact NLL")
    max_bad_steps: int = doc(
        "steps in a row left out for a loss or gradient not finite; then stop", AT_LEAST_0
    )


@dataclass
class Eval:
    checkpoint_path: str | None = doc(
        ".ckpt, exported folder or hub id; null: the algorithm's newest in save_dir or outputs/"
    )
    disable_ema: bool = doc("use the raw weights, not their average")
    tokens_per_batch: int | None = doc(
        "of a device's validation batch; the result does not depend on it; null:"
        " loader.eval_batch_size rows",
        AT_LEAST_1,
    )
    perplexity_batch_size: int = doc("texts the judge scores together", AT_LEAST_1)
    gen_ppl_eval_model_name_or_path: str | None = doc("judge of generative perplexity; null: none")


@dataclass
class Optim:
    lr: float = doc("AdamW's learning rate after warm-up", ABOVE_0)
    beta1: float = doc("AdamW, in [0, 1)", FROM_0_BELOW_1)
    beta2: float = doc("AdamW, in [0, 1)", FROM_0_BELOW_1)
    eps: float = doc("AdamW", ABOVE_0)
    weight_decay: float = doc("AdamW", AT_LEAST_0)


@dataclass
class Trainer:
    """Arguments of lightning.Trainer, under its own names."""

    accelerator: str = doc("what to compute on", one_of("auto", "gpu", "cpu"))
    devices: int = doc("devices per node, or auto", AT_LEAST_1)
    num_nodes: int = doc("machines", AT_LEAST_1)
    precision: str = doc(
        "of the computation, short names too (bf16); null: bf16 on a GPU, else 32",
        one_of("32-true", "bf16-mixed", "16-mixed", "64-true"),
    )
    max_steps: int = doc("optimizer steps", AT_LEAST_1)
    max_time: str | None = doc("stop after so much training, days:hours:minutes:seconds", DURATION)
    accumulate_grad_batches: int = doc(
        "passes per optimizer step; null: what the batch sizes need", AT_LEAST_1
    )
    gradient_clip_val: float | None = doc("largest gradient; 0 or null: not clipped", AT_LEAST_0)
    gradient_clip_algorithm: str = doc("what is limited", one_of("norm", "value"))
    limit_train_batches: int | float | None = doc(
        "training batches in all (int); null: no limit", BATCHES
    )
    limit_val_batches: int | float | None = doc(
        "validation batches (int) or share (float)", BATCHES_OR_SHARE
    )
    val_check_interval: int | float = doc(
        "training batches from one validation to the next", BATCHES
    )
    num_sanity_val_steps: int = doc("validation batches before training; -1: all", AT_LEAST_MINUS_1)
    log_every_n_steps: int = doc("optimizer steps from one log line to the next", AT_LEAST_1)
    enable_checkpointing: bool = doc("write checkpoints")
    enable_progress_bar: bool = doc("show progress")
    enable_model_summary: bool = doc("show the table of layers")
    deterministic: bool = doc("refuse operations that are not reproducible")
    benchmark: bool = doc("let cuDNN try several algorithms")
    detect_anomaly: bool = doc("autograd's search for NaN; slow")


@dataclass
class Data:
    train: str | None = doc("corpus, or a .txt, .jsonl or .parquet file")
    valid: str | None = doc("the same for validation")
    source: str | None = doc("a local copy of the corpus, instead of the hub; see data/corpora.py")
    text_column: str | None = doc("column or field of the text; null: the corpus's own, or text")
    tokenizer_name_or_path: str = doc(
        "gpt2, bert-base-uncased, text8, characters, characters:ACGT, shakespeare-bpe, folder, hub"
    )
    eos_token: str | None = doc("ends documents and chunks; null: the tokenizer's own")
    cache_dir: str = doc("prepared data: folder or URL; null: bamdlm/ in the user's cache folder")
    train_revision: str | None = doc("revision on the hub; null: the corpus's known good one")
    valid_revision: str | None = doc("the same for validation")
    wrap: bool = doc("join documents and cut into chunks of L; false: one document per row")
    pack: str = doc(
        "whether a chunk is running text, or keeps documents apart", one_of("wrap", "documents")
    )
    streaming: bool = doc("tokenize the training split while training instead of preparing it")
    insert_train_eos: bool = doc("EOS after each training document")
    insert_train_special: bool = doc("BOS and EOS round each training chunk, or packed document")
    insert_valid_eos: bool = doc("EOS after each validation document")
    insert_valid_special: bool = doc("BOS and EOS round each validation chunk, or packed document")


@dataclass
class Algo:
    name: str = doc("algorithm", one_of("bamdlm", "mdlm", "sedd", "ar"))
    backbone: str = doc(
        "dit is built from model.*, hf_dit from an exported folder or hub id",
        one_of("dit", "hf_dit"),
    )
    parameterization: str = doc(
        "what the logits mean; belongs to the algorithm", one_of("subs", "sedd", "ar")
    )
    time_conditioning: bool = doc("tell the network the noise level")
    T: int = doc("sampling steps per block; 0: continuous time", AT_LEAST_0)
    ignore_bos: bool = doc("never mask position 0")
    cross_attn: bool = doc("block-diffusion mask over [x_t ; x0] (bamdlm)")
    var_min: bool = doc("may search a clipped noise schedule (bamdlm)")
    clip_search_delta: float = doc("distance of the intervals searched", BETWEEN_0_AND_1)
    clip_search_widths: list[float] = doc("widths of the intervals searched; []: no search", SHARES)
    fix_clipping: bool = doc("search and log, but keep the training interval")
    sampler: str = doc(
        "how samples are drawn; belongs to the algorithm", one_of("semi_ar", "analytic", "ar")
    )
    mdlm_loss_scale: bool = doc("loglinear through total noise, p = (1 - 1e-3) t")


@dataclass
class Model:
    hidden_size: int = doc("width, a multiple of 2 n_heads", AT_LEAST_1)
    cond_dim: int = doc("width of the timestep embedding", AT_LEAST_1)
    length: int = doc("L, tokens of a sequence", AT_LEAST_1)
    n_blocks: int = doc("layers", AT_LEAST_1)
    n_heads: int = doc("attention heads", AT_LEAST_1)
    dropout: float = doc("in [0, 1)", FROM_0_BELOW_1)
    adaln: bool = doc("ar only: modulate by a timestep embedding as the others do")
    attn_backend: str = doc(
        "how attention is computed; auto: what suits algorithm and machine",
        one_of("auto", *attention_backends()),
    )
    compile: bool = doc("compile the blocks (a minute or two at the start); needs a compiler")


@dataclass
class Noise:
    type: str = doc("noise schedule", one_of(*schedules()))


@dataclass
class LRScheduler:
    name: str = doc(
        "learning-rate schedule", one_of("constant_warmup", "constant", "cosine_decay_warmup")
    )
    num_warmup_steps: int = doc(
        "optimizer steps up to optim.lr; null: a tenth of max_steps", AT_LEAST_0
    )
    warmup_lr_init: float | None = doc("where cosine_decay_warmup begins", AT_LEAST_0)
    lr_min: float | None = doc("where cosine_decay_warmup ends", AT_LEAST_0)


@dataclass
class Strategy:
    name: str = doc("how several devices share the work", one_of("ddp", "fsdp"))


@dataclass
class CheckpointEveryNSteps:
    every_n_train_steps: int = doc("optimizer steps from one checkpoint to the next", AT_LEAST_1)


@dataclass
class CheckpointMonitor:
    monitor: str = doc(
        "metric by which the best checkpoint is chosen", one_of("val/nll", "val/bpd", "val/ppl")
    )
    mode: str = doc("whether less or more of it is better", one_of("min", "max"))
    save_top_k: int = doc("best of them kept; -1: all", AT_LEAST_MINUS_1)


@dataclass
class LearningRateMonitor:
    logging_interval: str = doc("how often", one_of("step", "epoch"))


@dataclass
class Callbacks:
    """Each may be null, which leaves it out."""

    checkpoint_every_n_steps: CheckpointEveryNSteps | None = doc("checkpoints at intervals")
    checkpoint_monitor: CheckpointMonitor | None = doc("the best checkpoint")
    learning_rate_monitor: LearningRateMonitor | None = doc("logs the learning rate")


@dataclass
class Checkpointing:
    save_dir: str = doc("folder of the run; ${cwd:} is outputs/<data>/<name>-<hash>")
    resume_from_ckpt: bool = doc("go on from resume_ckpt_path where it exists")
    resume_ckpt_path: str = doc("checkpoint to go on from")
    keep_last: int = doc("newest step=N.ckpt kept; -1: all", AT_LEAST_MINUS_1)
    keep_every: int | None = doc(
        "kept for good: those whose step is a multiple; null: none", AT_LEAST_1
    )
    on_save_error: str = doc("when a checkpoint cannot be written", one_of("continue", "stop"))


@dataclass
class WandB:
    project: str = doc("wandb's own, as all below")
    notes: str | None = doc("")
    group: str | None = doc("")
    job_type: str | None = doc("")
    name: str | None = doc("also names the run folder")
    id: str | None = doc("")
    tags: list[str | None] = doc("")
    offline: bool = doc("write to disk only")


@dataclass
class Config:
    mode: str = doc("what the command does", one_of(*modes()))
    seed: int = doc("of weights, data order, noise and samples", SEED)
    block_size: int = doc("S, divides L; ar: 1", AT_LEAST_1)
    loader: Loader
    sampling: Sampling
    training: Training
    eval: Eval
    optim: Optim
    trainer: Trainer
    data: Data
    algo: Algo
    model: Model
    noise: Noise
    lr_scheduler: LRScheduler
    strategy: Strategy
    callbacks: Callbacks
    checkpointing: Checkpointing
    wandb: WandB | None
