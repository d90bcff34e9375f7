"""Settings that were changed although nothing in this run reads them: a one-line warning each."""

from collections.abc import Collection, Iterator

import settings.tables as tables
from settings.defaults import EVALUATES, all_devices, sized_by_checkpoint
from settings.keys import changed
from settings.rules.noise import OF_COUNTS
from settings.schema import Config

SIZES = ("hidden_size", "n_blocks", "n_heads")  # of model.*, and of one network alone:
OF_DIT = ("cond_dim", "adaln")
OF_LLAMA = (
    "n_kv_heads",
    "head_dim",
    "ffn_size",
    "rope_theta",
    "rms_norm_eps",
    "qk_norm",
    "qkv_bias",
    "tied",
)
DRAWN_IN_TRAINING = (  # of training.*
    "sampling_eps_min",
    "sampling_eps_max",
    "resample",
    "noise",
    "counts",
    "count_law",
    "views",
)
OF_NOISE = {  # settings with their usual values
    "noise.type": "loglinear",
    "algo.ignore_bos": False,
    "algo.mdlm_loss_scale": False,
    "training.noise": "times",
    **OF_COUNTS,
    "training.resample": False,
    "training.antithetic_sampling": True,
    "training.sampling_eps": 1e-3,
    "training.sampling_eps_min": 1e-3,
    "training.sampling_eps_max": 1,
}


def without_effect(config: Config, typed: Collection[str]) -> Iterator[str]:
    """Sentences; settings left at their defaults are never mentioned, and what an experiment sets
    for all modes only if it is typed."""
    if config.mode in ("train", "plan"):
        yield from _training(config)
    elif config.mode in EVALUATES and config.training.from_pretrained is not None:
        yield (
            f"training.from_pretrained={config.training.from_pretrained} has no effect:"
            f" mode={config.mode} reads eval.checkpoint_path"
        )
    if config.mode == "demo":
        yield from _demo(typed)
    if config.mode == "sample_eval":
        yield from _sampling(config)
    yield from _evaluation(config, typed)
    if config.mode == "train" and config.training.noise == "counts":
        for key in ("training.sampling_eps_min", "training.sampling_eps_max", "noise.type"):
            if key in typed or (key == "noise.type" and config.noise.type != "loglinear"):
                yield f"{key} has no effect: training.noise=counts draws no times"
    yield from _recomputing(config, typed)
    if config.mode not in ("train", "plan", "demo") and "model.param_dtype" in typed:
        yield f"model.param_dtype has no effect: mode={config.mode} trains nothing"
    yield from _groups(config)
    if config.strategy.gradients != "float32":
        yield from _exchange(config)
    yield from _adapters(config, typed)
    yield from _network(config, typed)
    if config.mode != "train" and "trainer.profiler" in typed and config.trainer.profiler:
        yield f"trainer.profiler has no effect: mode={config.mode} trains nothing"
    yield from _plan(config, typed)
    yield from _algorithm(config)
    yield from _data(config)


def _evaluation(config: Config, typed: Collection[str]) -> Iterator[str]:
    mode, sizes = config.mode, config.eval.block_sizes
    if mode == "sample_eval" and config.eval.tokens_per_batch is not None:
        yield "eval.tokens_per_batch has no effect: mode=sample_eval has sampling.batch_size"
    if mode != "ppl_eval" and config.eval.draws != 1:
        yield f"eval.draws has no effect: mode={mode} draws once; mode=ppl_eval has draws"
    if mode != "ppl_eval" and sizes is not None:
        yield f"eval.block_sizes has no effect: mode={mode} does not measure at several"
    if mode == "ppl_eval" and sizes and "block_size" in typed:
        yield f"block_size has no effect: eval.block_sizes={sizes} has the sizes"
    entry = tables.algorithms()[config.algo.name]
    chosen = config.training.eval_nll or (entry["blocks"] and config.block_size == 1)
    if mode in ("train", "plan", "ppl_eval") and not chosen:
        yield (
            "training.eval_nll=False has no effect: only algo=bamdlm with block_size=1 has the"
            " choice"
        )
    if mode != "ppl_eval" or not entry["noise"]:
        return
    measured = f"measures at {'eval.block_sizes' if sizes else 'block_size'}"
    reasons = {f"training.{name}": "draws from the full interval" for name in DRAWN_IN_TRAINING}
    reasons |= {f"training.{name}": measured for name in ("block_sizes", "block_schedule")}
    reasons["adapt.ar_loss"] = "measures diffusion alone"
    for key, why in reasons.items():
        if key in typed:
            yield f"{key} has no effect: mode=ppl_eval {why}"


def _plan(config: Config, typed: Collection[str]) -> Iterator[str]:
    if config.mode == "plan" and {"plan.nodes", "trainer.num_nodes"} <= set(typed):
        yield f"trainer.num_nodes has no effect: it is planned for plan.nodes={config.plan.nodes}"
    for key in ("plan.gpu", "plan.nodes"):
        if config.mode != "plan" and key in typed:
            yield f"{key} has no effect: mode={config.mode} plans nothing"


def _recomputing(config: Config, typed: Collection[str]) -> Iterator[str]:
    model, trainer = config.model, config.trainer
    key, value = "model.activation_checkpointing", model.activation_checkpointing
    if value == "none":
        return
    if config.mode not in ("train", "plan"):
        if key in typed:
            yield f"{key} has no effect: mode={config.mode} has no backward pass"
    elif (
        model.compile
        and trainer.accelerator == "gpu"
        and trainer.num_nodes == 1
        and config.strategy.name != "fsdp"  # which is never replayed
    ):
        yield f"{key}={value}: steps are not replayed as CUDA graphs, as they are with none"


def _groups(config: Config) -> Iterator[str]:
    key, strategy = f"strategy.replicate={config.strategy.replicate}", config.strategy.name
    if config.strategy.replicate == 1:
        return
    if config.mode not in ("train", "plan"):
        yield f"{key} has no effect: mode={config.mode} trains nothing"
    elif strategy != "fsdp":
        yield f"{key} has no effect: strategy={strategy} has a copy on every device"


def _exchange(config: Config) -> Iterator[str]:
    key = f"strategy.gradients={config.strategy.gradients}"
    if config.mode not in ("train", "plan"):
        yield f"{key} has no effect: mode={config.mode} has no gradients"
    elif all_devices(config) == 1:
        yield f"{key} has no effect: one device exchanges nothing"


def _adapters(config: Config, typed: Collection[str]) -> Iterator[str]:
    for key in sorted(key for key in typed if key.startswith("lora.")):
        if config.mode not in ("train", "plan"):
            yield f"{key} has no effect: mode={config.mode} trains nothing"
        elif key != "lora.rank" and config.lora.rank is None:
            yield f"{key} has no effect without lora.rank"
        elif key == "lora.mask_row" and config.lora.mask_row and config.algo.name == "ar":
            yield "lora.mask_row=True has no effect: algo=ar sees no mask"


def _network(config: Config, typed: Collection[str]) -> Iterator[str]:
    """Sizes that nobody reads: of the other network, or with those of a checkpoint."""
    backbone, sized = config.algo.backbone, sized_by_checkpoint(config)
    for key in sorted(typed):
        name = key.removeprefix("model.")
        if name == key or config.mode in ("demo", "prepare"):
            continue
        if sized and name in (*SIZES, *OF_DIT, *OF_LLAMA):
            yield f"{key} has no effect: algo.backbone={backbone} takes sizes from the checkpoint"
        elif backbone == "llama" and name in OF_DIT:
            yield f"{key} has no effect: algo.backbone=llama takes no noise level"
        elif backbone == "dit" and name in OF_LLAMA:
            yield f"{key} has no effect without algo.backbone=llama"


def _demo(typed: Collection[str]) -> Iterator[str]:
    """What neither the page has nor the checkpoint leaves open."""
    names = {"steps", "first_hitting", "nucleus_p", "prompt", *tables.step_numbers()}
    names |= {name for rule in tables.step_rules().values() for name in rule.get("reads", ())}
    read = {"model.length", *(f"sampling.{name}" for name in names)}
    for key in typed:
        if key.startswith(("model.", "sampling.")) and key not in read:
            yield f"{key} has no effect: mode=demo asks the checkpoint and the page"
    if "trainer.precision" in typed:
        yield "trainer.precision has no effect: mode=demo computes in float32"


def _training(config: Config) -> Iterator[str]:
    schedule, trainer = config.lr_scheduler, config.trainer
    reads = tables.lr_schedules()[schedule.name].get("reads", ())
    unset = {"num_warmup_steps": 0, "warmup_lr_init": None, "lr_min": None}
    for key, nothing in unset.items():
        if key not in reads and getattr(schedule, key) != nothing:
            yield f"lr_scheduler.{key} has no effect: lr_scheduler={schedule.name}"
    if config.optim.name == "adamw" and config.optim.momentum is not None:
        yield "optim.momentum has no effect: optim=adamw has beta1"
    if schedule.name == "constant_warmup" and schedule.num_warmup_steps >= trainer.max_steps:
        yield (
            f"lr_scheduler.num_warmup_steps={schedule.num_warmup_steps} is not below"
            f" trainer.max_steps={trainer.max_steps}: optim.lr is never reached"
        )
    sizes = config.training.block_schedule or {}
    if late := [step for step in sorted(sizes) if step >= trainer.max_steps]:
        yield (
            f"training.block_schedule: blocks of {sizes[late[0]]} begin at step {late[0]}, which is"
            f" not below trainer.max_steps={trainer.max_steps}: they are never trained"
        )


def _algorithm(config: Config) -> Iterator[str]:
    algo = config.algo
    noise = tables.algorithms()[algo.name]["noise"]
    if config.model.adaln and noise and algo.backbone != "llama":
        yield f"model.adaln=True has no effect: algo={algo.name} always modulates"
    if algo.fix_clipping and not algo.clip_search_widths:
        yield "algo.fix_clipping=True has no effect: algo.clip_search_widths is empty"
    if noise:
        return
    for key in changed(config, OF_NOISE):
        yield f"{key.removesuffix('.type')} has no effect: algo={algo.name} has no noise"


def _sampling(config: Config) -> Iterator[str]:
    sampling, algo = config.sampling, config.algo
    entry = tables.algorithms()[algo.name]
    rules = tables.step_rules()
    reads = rules[sampling.steps].get("reads", ()) if sampling.steps else ()
    if algo.T and not entry["noise"]:
        yield f"algo.T={algo.T} has no effect: {algo.name} takes one step per token"
    elif algo.T and sampling.steps and "num_steps" not in reads:
        yield f"algo.T={algo.T} has no effect: steps={sampling.steps} ends when nothing is masked"
    if "steps" not in entry["can"] and not sampling.first_hitting:
        yield f"sampling.first_hitting=False has no effect: algo={algo.name} has its own steps"
    if "cache" not in entry["can"] and sampling.context_size is not None:
        yield f"sampling.context_size has no effect: algo={algo.name} has no blocks to look back on"
    if sampling.temperature == 0 and sampling.top_k:
        yield "sampling.top_k has no effect: sampling.temperature=0 takes the likeliest token"
    defaults = tables.class_defaults("samplers/params.py", "SamplingParams")
    defaults |= {name: number["default"] for name, number in tables.step_numbers().items()}
    for key, value in vars(sampling).items():
        readers = [name for name, rule in rules.items() if key in rule.get("reads", ())]
        if readers and key not in reads and value != defaults[key]:
            yield f"sampling.{key} has no effect without sampling.steps={' or '.join(readers)}"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.chat_fields and data.format != "chat":
        yield f"data.chat_fields has no effect: data.format={data.format}"
    if data.stream_by != "units" and not data.streaming:
        yield f"data.stream_by={data.stream_by} has no effect without data.streaming=true"
    if not data.wrap:
        for key in ("train_special", "valid_special", "train_eos", "valid_eos"):
            if not getattr(data, f"insert_{key}"):
                yield f"data.insert_{key}=False has no effect: data.wrap=False joins nothing"
    for split in ("train", "valid"):
        special, eos = f"insert_{split}_special", f"insert_{split}_eos"
        if data.pack != "wrap" and getattr(data, special) and not getattr(data, eos):
            yield f"data.{eos}=False has no effect: data.{special} puts EOS after each document"
        name, revision = getattr(data, split), getattr(data, f"{split}_revision")
        if revision is not None and name is not None and name not in tables.corpora_on_the_hub():
            yield f"data.{split}_revision has no effect: {name} does not come from the hub"
        elif revision is not None and data.source is not None:
            yield f"data.{split}_revision has no effect: data.source={data.source} is read"
