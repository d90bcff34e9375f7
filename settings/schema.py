"""The schema of a run: every setting with its type and what it means.

The values are in configs/ (config.yaml and one file per choice of a group); a test holds the two
together. In the YAML files null means "chosen when the run starts"; where the type here has no
None, settings.load has chosen. A device is a GPU, or a process on a CPU.
"""

# ruff: noqa: RUF009  doc() is dataclasses.field

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import settings.tables as tables
from settings.limits import (
    BATCHES,
    BATCHES_OR_SHARE,
    BY_WORDS,
    CHAT_FIELDS,
    COUNTS,
    DURATION,
    LIMITS,
    SCHEDULE,
    SEED,
    SHARES,
    SIZES,
    VIEWS,
    Limit,
    one_of,
)

TYPES = {"int": int, "float": float}
LIKELIHOODS = Limit(
    f"made of {', '.join(tables.likelihoods())}, some with a number, such as iw:8 or threshold:0.9;"
    " a step rule that looks at the drawn token or at chance has no likelihood",
    lambda value: bool(value) and all(name.split(":")[0] in tables.likelihoods() for name in value),
    ["nelbo"],
)


def doc(text: str, limit: Limit | str | None = None, default: object = None):
    """A required setting: what --help says about it, and what it may be beside its type (the words
    of LIMITS, or a Limit). With `default` it needs no line in configs/."""
    limit = LIMITS[limit] if isinstance(limit, str) else limit
    return field(metadata={"doc": text, "limit": limit, "default": default})


def _values(field: str) -> list[str]:
    """Of a field of the algorithms, each once."""
    return list(dict.fromkeys(entry[field] for entry in tables.algorithms().values()))


@dataclass
class Loader:
    global_batch_size: int = doc("sequences per optimizer step, on all devices", "at least 1")
    eval_global_batch_size: int = doc("sequences per evaluation batch on all devices", "at least 1")
    batch_size: int | None = doc(
        "sequences per device and forward pass; null: global_batch_size / devices. Smaller "
        "values accumulate gradients",
        "at least 1",
    )
    eval_batch_size: int | None = doc(
        "the same in evaluation; null: eval_global_batch_size / devices", "at least 1"
    )
    num_workers: int | None = doc("processes that load data; null: one per core", "at least 0")
    pin_memory: bool = doc("load batches into page-locked memory, which speeds up copies to a GPU")


@dataclass
class _Texts:
    num_sample_batches: int = doc(
        "batches of sampling.batch_size texts to sample: their product is the number of texts",
        "at least 1",
    )
    batch_size: int | None = doc(
        "texts sampled together on a device; null: loader.eval_batch_size. The number of texts is"
        " sampling.num_sample_batches times this",
        "at least 1",
    )
    var_length: bool = doc("stop a text at EOS or when its entropy is low, and cut it there")
    logdir: str = doc("CSV file to which the samples are written")
    nucleus_p: float = doc("keep the likeliest tokens up to this probability; 1: all", "in (0, 1]")
    first_hitting: bool = doc("reveal one token a step, at its exact time; false: ancestral steps")
    steps: str | None = doc(
        "which tokens a step reveals; null: by sampling.first_hitting", one_of(*tables.step_rules())
    )
    confidence: str = doc("how steps=confidence ranks positions", one_of(*tables.confidences()))


def _step_number(name: str, number: dict) -> tuple:
    for key, known in (("type", TYPES), ("limit", BY_WORDS)):
        if number.get(key) not in known:
            raise ValueError(
                f"samplers/params.py: the {key} of {name} must be one of"
                f" {', '.join(map(repr, known))}, got {number.get(key)!r}"
            )
    return name, TYPES[number["type"]], doc(number["doc"], number["limit"], number["default"])


_StepNumbers = make_dataclass(  # of the step rules, as samplers/params.py has them
    "_StepNumbers",
    [_step_number(name, number) for name, number in tables.step_numbers().items()],
    bases=(_Texts,),
    namespace={"__module__": __name__},
)


@dataclass
class Sampling(_StepNumbers):
    kv_cache: bool = doc("keep keys and values of earlier blocks; exact, for algo=bamdlm and ar")
    context_size: int | None = doc(
        "tokens that a block sees, itself included; a multiple of block_size if a text is longer; "
        "null: length of training if known, else 1024",
        "at least 1",
    )
    dtype: str = doc(
        "format for drawing tokens; float32 is right for rare ones too",
        one_of("float32", "float64"),
    )
    prompt: str | None = doc("text with which every sample begins")
    prompts: str | None = doc("file of prompts: .txt (one per line) or .jsonl (field `prompt`)")
    infill: bool = doc("fill the [MASK] gaps of the prompts")
    reject_low_entropy: bool = doc("redraw texts of low entropy up to 10 times, as the authors did")
    show: bool = doc("show the text in the terminal while it is denoised")
    trajectory: str | None = doc(".html file that replays the denoising")
    sweep: dict[str, Any] | None = doc(
        "several settings in one start: lists of values by name, such as {threshold: [0.6, 0.9], "
        "temperature: [0.8, 1]}; each combination is a run of its own in the same files"
    )


@dataclass
class Demo:
    host: str = doc("address that mode=demo listens on; 127.0.0.1: this machine alone reaches it")
    port: int = doc("port of the page; 0: any that is free", "at least 0 and at most 65535")


@dataclass
class Training:
    ema: float = doc("decay of the moving average of the weights; 0: no average", "in [0, 1)")
    antithetic_sampling: bool = doc(
        "spread the noise levels evenly over the global batch, which lowers the variance"
    )
    sampling_eps: float = doc(
        "lower end of the full interval of t, of validation and the clip search", "in (0, 1)"
    )
    sampling_eps_min: float = doc("lower end of the interval of t in training", "in (0, 1]")
    sampling_eps_max: float = doc("upper end of the interval of t in training", "in (0, 1]")
    resample: bool = doc(
        "redraw until each block's masked share is in [sampling_eps_min, sampling_eps_max]"
    )
    noise: str = doc(
        "what is drawn for each block: a time in [sampling_eps_min, sampling_eps_max], or the "
        "number of its masked tokens (bamdlm, mdlm)",
        one_of("times", "counts"),
    )
    counts: list[int] | None = doc(
        "with training.noise=counts, the least and the most masked tokens of a block, such as "
        "[2, 3], not reweighted: such a range is no bound; null: all, whose loss is the bound",
        COUNTS,
    )
    count_law: str = doc(
        "with training.noise=counts, each count equally likely, or as each validation finds it to "
        "vary least; both are the bound",
        one_of("uniform", "learnt"),
    )
    views: int = doc(
        "noised versions of a row in a step; 2: with training.noise=counts, of complementary "
        "masks, which share its clean half (bamdlm)",
        VIEWS,
    )
    block_sizes: dict[int, float] | None = doc(
        "sizes from which each row draws that of its blocks, with their proportions, such as "
        "{1: 0.25, 4: 0.5, 16: 0.25}; their sum does not matter. block_size, one of them, is that "
        "of validation (bamdlm); null: block_size",
        SIZES,
    )
    block_schedule: dict[int, int] | None = doc(
        "block sizes by the step from which they are trained, such as {0: 1, 500: 4, 1000: 16}; "
        "block_size, one of them, is that of validation (bamdlm); null: block_size",
        SCHEDULE,
    )
    from_pretrained: str | None = doc("weights to start from: .ckpt, exported folder or hub id")
    eval_nll: bool = doc("with block_size=1, validate the exact NLL, not the bound")
    max_bad_steps: int = doc(
        "skipped steps in a row (loss or gradient not finite) that stop training", "at least 0"
    )


@dataclass
class Adapt:
    clean: str = doc(
        "what a clean token sees (bamdlm): its block and those before it, or as in an AR network "
        "itself and the tokens before it",
        one_of("block", "causal"),
    )
    label: str = doc(
        "where the prediction of a token is read (bamdlm): at itself, or as in an AR network at "
        "the token before it",
        one_of("same", "next"),
    )
    ar_loss: float = doc(
        "with adapt.clean=causal, how often the AR loss on the clean half counts in training, "
        "beside the loss of diffusion",
        "at least 0",
    )


@dataclass
class Eval:
    checkpoint_path: str | None = doc(
        ".ckpt, exported folder or hub id; null: newest of this algorithm in save_dir or outputs/"
    )
    disable_ema: bool = doc("use the weights themselves, not their moving average")
    tokens_per_batch: int | None = doc(
        "tokens of a validation batch on a device; changes speed and memory, not the result; "
        "null: loader.eval_batch_size rows",
        "at least 1",
    )
    likelihood: list[str] | None = doc(
        "which likelihood mode=ppl_eval reports, or a list of them; training validates by nelbo or "
        "counts; null: counts, sedd nelbo, ar and blocks of one exact, of eval.block_sizes exact "
        "or counts",
        LIKELIHOODS,
    )
    block_sizes: dict[int, float] | None = doc(
        "mode=ppl_eval: measure at each of these block sizes, and the mixture of texts at all of "
        "them by these weights, such as {1: 0.25, 4: 0.5, 16: 0.25}; null: at block_size (bamdlm)",
        SIZES,
    )
    draws: int = doc("draws of a sampled likelihood, whose mean is reported", "at least 1")
    max_passes: int = doc(
        "most passes over a text that a likelihood may take; with eval.block_sizes each size takes "
        "the first of eval.likelihood that needs no more",
        "at least 1",
    )
    perplexity_batch_size: int = doc("texts that the judge scores together", "at least 1")
    gen_ppl_eval_model_name_or_path: str | None = doc(
        "language model that judges samples (generative perplexity): folder, hub id or checkpoint"
        " of algo=ar; null: none"
    )


@dataclass
class Optim:
    name: str = doc(
        "optimizer; choose it with optim=NAME: AdamW, or Muon for the matrices of the blocks and "
        "AdamW for all else",
        one_of("adamw", "muon"),
    )
    lr: float = doc("learning rate, after the warm-up; of Muon too", "above 0")
    beta1: float = doc("AdamW: decay of the average of gradients", "in [0, 1)")
    beta2: float = doc("AdamW: decay of the average of squared gradients", "in [0, 1)")
    eps: float = doc("AdamW: added to the denominator", "above 0")
    weight_decay: float = doc("weight decay; of Muon too", "at least 0")
    momentum: float | None = doc("Muon: decay of the average of gradients", "in [0, 1)")


@dataclass
class Trainer:
    """Arguments of lightning.Trainer, under its own names."""

    accelerator: str = doc("device; auto: a GPU where there is one", one_of("auto", "gpu", "cpu"))
    devices: int | None = doc(
        "devices per machine; auto: all GPUs, or one CPU process", "at least 1"
    )
    num_nodes: int = doc("number of machines", "at least 1")
    precision: str | None = doc(
        "number format; 32, bf16 and 16 are short; null: bf16-mixed on a GPU, else 32-true",
        one_of("32-true", "bf16-mixed", "16-mixed"),
    )
    max_steps: int = doc("optimizer steps of the run", "at least 1")
    max_time: str | None = doc("stop training after this time", DURATION)
    accumulate_grad_batches: int | None = doc(
        "forward passes per optimizer step; null: as many as the batch sizes need", "at least 1"
    )
    gradient_clip_val: float | None = doc("limit of the gradient; 0 or null: none", "at least 0")
    gradient_clip_algorithm: str = doc("limit the norm or each value", one_of("norm", "value"))
    limit_train_batches: int | float | None = doc("most training batches; null: no limit", BATCHES)
    limit_val_batches: int | float | None = doc(
        "validation batches: a number, or a share such as 0.5; null: all", BATCHES_OR_SHARE
    )
    val_check_interval: int | float = doc(
        "training batches between validations. It counts batches, not optimizer steps: one "
        "step takes trainer.accumulate_grad_batches batches",
        BATCHES,
    )
    num_sanity_val_steps: int = doc(
        "validation batches tried before training; -1: all", "at least -1"
    )
    log_every_n_steps: int = doc(
        "optimizer steps between two rows of metrics.csv; lines in the terminal follow the clock",
        "at least 1",
    )
    enable_checkpointing: bool = doc("write checkpoints")
    enable_progress_bar: bool = doc("show a progress bar")
    enable_model_summary: bool = doc("print a table of the layers")
    deterministic: bool = doc("refuse operations whose results vary from run to run")
    benchmark: bool = doc("let cuDNN time several algorithms and take the fastest")
    detect_anomaly: bool = doc("find the operation that made a NaN; slow")
    profiler: str | None = doc(
        "torch: write what happens in five steps, from the eleventh on, into the run folder, for"
        " ui.perfetto.dev; null: nothing",
        one_of("torch"),
    )


@dataclass
class Data:
    train: str | None = doc("training text: name of a corpus, or .txt, .jsonl or .parquet files")
    valid: str | None = doc("validation text: the same")
    source: str | None = doc("local copy of the corpus (file or folder), read instead of the hub")
    text_column: str | None = doc(
        "column or field that holds the text; null: the corpus's own, `text` in your files"
    )
    format: str = doc(
        "what your files hold: text, or conversations of messages, of which the answers alone are"
        " learnt (data=chat)",
        one_of("text", "chat"),
    )
    chat_fields: dict[str, Any] | None = doc(
        "with data.format=chat, what your files call messages, prompt, response, role, content, or"
        " the roles system, user, assistant, such as {messages: conversations, role: from}",
        CHAT_FIELDS,
    )
    tokenizer_name_or_path: str = doc(
        "tokenizer: gpt2, bert-base-uncased, text8, characters, characters:ACGT, shakespeare-bpe,"
        " state_of_the_union-bpe, a folder or a hub id"
    )
    eos_token: str | None = doc("token that ends documents and chunks; null: the tokenizer's own")
    cache_dir: str | None = doc("folder or URL of prepared data; null: bamdlm/ in the user's cache")
    train_revision: str | None = doc("revision of the corpus on the hub; null: one known to work")
    valid_revision: str | None = doc("the same for validation")
    wrap: bool = doc("join documents, then cut chunks of model.length; false: one document per row")
    pack: str = doc(
        "with wrap, chunks are running text; with documents, each document starts at a block "
        "and sees only itself; whole is the same, but cuts no document that fits into a chunk",
        one_of("wrap", "documents", "whole"),
    )
    streaming: bool = doc("tokenize the training text during training, not before it")
    stream_by: str = doc(
        "with data.streaming: units, all devices read the whole text and each tokenizes its share;"
        " files, each reads files of its own, of which there must be 48 or more",
        one_of("units", "files"),
        default="units",
    )
    insert_train_eos: bool = doc("put EOS after each training document")
    insert_train_special: bool = doc("put BOS and EOS round training chunks or packed documents")
    insert_valid_eos: bool = doc("put EOS after each validation document")
    insert_valid_special: bool = doc("put BOS and EOS round validation chunks or packed documents")


@dataclass
class Algo:
    name: str = doc("algorithm; choose it with algo=NAME", one_of(*tables.algorithms()))
    backbone: str = doc(
        "network: dit from model.*; hf_dit from an exported folder or hub; llama (Llama, Qwen, "
        "Mistral, SmolLM2) from a checkpoint where there is one, else from model.*",
        one_of("dit", "hf_dit", "llama"),
    )
    parameterization: str = doc(
        "what the logits mean; fixed by the algorithm", one_of(*_values("parameterization"))
    )
    time_conditioning: bool = doc("tell the network the noise level; fixed by the algorithm")
    T: int = doc(
        "sampling steps per block, for rules that need a number; 0: none",
        "at least 0 and at most 1000000",
    )
    ignore_bos: bool = doc("never mask the first token of a row")
    cross_attn: bool = doc("train on noised and clean text with the block-diffusion mask (bamdlm)")
    var_min: bool = doc("allow the search for the interval of t with the least variance (bamdlm)")
    clip_search_delta: float = doc("distance between the intervals searched", "in (0, 1)")
    clip_search_widths: list[float] = doc(
        "widths of the intervals searched, or of the ranges of counts as shares of a block; []: no "
        "search",
        SHARES,
    )
    fix_clipping: bool = doc(
        "search and log, but keep training.sampling_eps_min and _max, or training.counts"
    )
    sampler: str = doc("how samples are drawn; fixed by the algorithm", one_of(*_values("sampler")))
    mdlm_loss_scale: bool = doc("loglinear noise by its total noise, as in MDLM: p = (1 - 1e-3) t")


@dataclass
class Model:
    hidden_size: int = doc(
        "width of the network, a multiple of 2 * n_heads", "at least 1 and at most 1000000"
    )
    cond_dim: int = doc(
        "width of the embedding of the noise level", "at least 1 and at most 1000000"
    )
    length: int = doc("tokens of a sequence", "at least 1")
    n_blocks: int = doc("number of layers", "at least 1 and at most 1000")
    n_heads: int = doc("attention heads per layer", "at least 1")
    dropout: float | None = doc("dropout probability; null: 0.1, llama: 0", "in [0, 1)")
    adaln: bool = doc("for algo=ar: modulate the layers by a noise level, as the others do")
    attn_backend: str = doc(
        "implementation of attention; auto: the fastest that suits algorithm and machine",
        one_of("auto", *tables.attention_backends()),
    )
    compile: bool = doc("compile the layers: faster after a minute or two; needs a C++ compiler")
    activation_checkpointing: str = doc(
        "layers whose activations the backward pass makes again, which saves memory and takes time:"
        " none, full (all but the last), selective (every second one)",
        one_of(*tables.activation_checkpointing()),
        default="none",
    )
    param_dtype: str = doc(
        "format of the weights in training; with bfloat16 the optimizer keeps float32 masters of "
        "those that are trained, and checkpoints hold these",
        one_of("float32", "bfloat16"),
        default="float32",
    )
    n_kv_heads: int | None = doc(
        "llama: heads of keys and values, a divisor of n_heads; null: n_heads", "at least 1"
    )
    head_dim: int | None = doc(
        "llama: width of a head, even; null: hidden_size / n_heads",
        "at least 1 and at most 1000000",
    )
    ffn_size: int | None = doc(
        "llama: inner width of the MLP; null: 8/3 of hidden_size, up to a multiple of 64",
        "at least 1 and at most 1000000",
    )
    rope_theta: float = doc("llama: base of the rotary positions", "above 0")
    rms_norm_eps: float = doc("llama: added to the mean square in norms", "above 0")
    qk_norm: bool = doc("llama: normalise queries and keys, as Qwen3 does")
    qkv_bias: bool = doc("llama: biases of queries, keys and values, as Qwen2 has them")
    tied: bool = doc("llama: the embedding is the head's weight too")


@dataclass
class LoRA:
    """Of training: small matrices beside the linear layers, and all else frozen."""

    rank: int | None = doc(
        "rank of the adapters that are trained beside frozen weights (training.from_pretrained); "
        "null: all weights are trained",
        "at least 1",
    )
    alpha: float | None = doc(
        "an adapter's product is multiplied by alpha / rank; null: twice the rank", "above 0"
    )
    dropout: float = doc("dropout probability of what enters an adapter", "in [0, 1)")
    modules: list[str] | None = doc(
        "linear layers of the blocks that get one, such as [q_proj, v_proj]; null: all"
    )
    mask_row: bool = doc(
        "train the mask's row of the embedding too; algo=ar, which sees no mask, has none"
    )


@dataclass
class Noise:
    type: str = doc("noise schedule; choose it with noise=NAME", one_of(*tables.schedules()))


@dataclass
class LRScheduler:
    name: str = doc("learning-rate schedule; set lr_scheduler=NAME", one_of(*tables.lr_schedules()))
    num_warmup_steps: int | None = doc(
        "optimizer steps until lr is optim.lr; null: a tenth of trainer.max_steps", "at least 0"
    )
    warmup_lr_init: float | None = doc("learning rate at start (cosine_decay_warmup)", "at least 0")
    lr_min: float | None = doc("learning rate at the end (cosine_decay_warmup)", "at least 0")


@dataclass
class Strategy:
    name: str = doc("devices: ddp copies weights to each, fsdp shards them", one_of("ddp", "fsdp"))
    replicate: int = doc(
        "groups of devices, each of which shards a copy of the weights (fsdp); 1: one of all",
        "at least 1",
        default=1,
    )
    gradients: str = doc(
        "what devices exchange gradients in; bf16: half the bytes, rounded to 8 bits of precision",
        one_of("float32", "bf16"),
        default="float32",
    )


@dataclass
class PlannedFor:
    """Of mode=plan: other machines than this one, as in plan.gpu=H100-80GB plan.nodes=4."""

    gpu: str | None = doc(
        "GPU to plan for; null: the one at hand. trainer.devices is how many a node has, one where"
        " it is not set, and 8 on several nodes",
        one_of(*tables.gpus()),
    )
    nodes: int | None = doc("nodes to plan for; null: trainer.num_nodes", "at least 1")


@dataclass
class CheckpointEveryNSteps:
    every_n_train_steps: int = doc("optimizer steps between checkpoints", "at least 1")


@dataclass
class CheckpointMonitor:
    monitor: str = doc(
        "metric that ranks checkpoints",
        one_of(*(name for name, entry in tables.logged_figures().items() if entry.get("monitor"))),
    )
    mode: str = doc("whether the best is the smallest or the largest", one_of("min", "max"))
    save_top_k: int = doc("how many of the best are kept; -1: all", "at least -1")


@dataclass
class LearningRateMonitor:
    logging_interval: str = doc("when it is logged", one_of("step", "epoch"))


@dataclass
class Callbacks:
    """Each may be null, which leaves it out."""

    checkpoint_every_n_steps: CheckpointEveryNSteps | None = doc("write checkpoints at intervals")
    checkpoint_monitor: CheckpointMonitor | None = doc("keep the best checkpoint")
    learning_rate_monitor: LearningRateMonitor | None = doc("log the learning rate")


@dataclass
class Checkpointing:
    save_dir: str = doc(
        "run folder or URL; ${cwd:} is outputs/DATA/NAME-HASH, the same for the same settings"
    )
    resume_from_ckpt: bool = doc("continue from resume_ckpt_path if it exists")
    resume_ckpt_path: str = doc("checkpoint to continue from")
    format: str = doc(
        "how a checkpoint is written: file is one file, which the first process brings together;"
        " sharded is a folder to which every process writes what it holds, while training goes on"
        " (scripts/consolidate.py makes the file of it)",
        one_of("file", "sharded"),
    )
    keep_last: int = doc("how many of the newest step=N.ckpt are kept; -1: all", "at least -1")
    keep_every: int | None = doc(
        "keep for good the checkpoints whose step is a multiple of this; null: none", "at least 1"
    )
    on_save_error: str = doc("when a checkpoint cannot be written", one_of("continue", "stop"))


@dataclass
class WandB:
    project: str = doc("Weights & Biases: project")
    notes: str | None = doc("Weights & Biases: notes")
    group: str | None = doc("Weights & Biases: group of runs")
    job_type: str | None = doc("Weights & Biases: type of the run")
    name: str | None = doc("Weights & Biases: name of the run; names the run folder too")
    id: str | None = doc("Weights & Biases: id of the run")
    tags: list[str | None] = doc("Weights & Biases: tags")
    offline: bool = doc("Weights & Biases: log to disk only")


@dataclass
class Config:
    mode: str = doc("what the command does", one_of(*tables.modes()))
    seed: int = doc("seed of weights, data order, noise and samples", SEED)
    block_size: int = doc("tokens of a block; divides model.length; 1 for algo=ar", "at least 1")
    loader: Loader
    sampling: Sampling
    demo: Demo
    training: Training
    adapt: Adapt
    eval: Eval
    optim: Optim
    trainer: Trainer
    data: Data
    algo: Algo
    model: Model
    lora: LoRA
    noise: Noise
    lr_scheduler: LRScheduler
    strategy: Strategy
    plan: PlannedFor
    callbacks: Callbacks
    checkpointing: Checkpointing
    wandb: WandB | None
