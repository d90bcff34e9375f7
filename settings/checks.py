"""What must hold between settings: check() says in one sentence each what stops a run.

Each rule is a generator of sentences that name the setting as typed, its value and the way out.
"""

import copy
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator

from settings.amounts import amounts
from settings.composing import read
from settings.defaults import (
    all_devices,
    has_package,
    has_wide_heads,
    head_width,
    is_elsewhere,
    needs_block_mask,
    sized_by_checkpoint,
    started_by_torchrun,
    torch_version,
    visible_gpus,
)
from settings.effects import without_effect
from settings.keys import LEAVES, get, put
from settings.limits import unfit
from settings.noise import adaptation, block_sizes, clipping, counts
from settings.overrides import nearest, parse
from settings.packages import packages
from settings.paths import blamed, chats, checkpoints, corpora, results, sampling_files
from settings.schema import Config
from settings.sweep import sweep
from settings.tables import algorithms, attention_backends, known_corpora, names_with
from utils import CIRCUMSTANCES

Rule = Callable[[Config], Iterator[str]]
DISTRIBUTED = ("train", "ppl_eval", "sample_eval")  # modes that share work out by trainer.devices
MUON_SINCE = (2, 9)  # of torch
SPECIAL_TOKENS = 2  # BOS and EOS of a chunk


def examine(
    overrides: list[str], rules: Iterable[Rule] = ()
) -> tuple[Config | None, list[str], list[str]]:
    """The settings of a command line, everything that is wrong with them, and warnings. The Config
    is None where it cannot be made; never raises ConfigError. rules: as in check."""
    parsed = parse(overrides)
    config, problems, notes = read(parsed)
    if config is None:
        return None, problems, notes
    more, warnings = check(config, {key for key, _ in parsed.values}, rules)
    # what is refused already has its default here
    begun = {re.split(r"[=: ]", problem.lstrip("'\""))[0] for problem in problems}
    return config, problems + _without(begun & LEAVES.keys(), more), notes + warnings


def check(
    config: Config, typed: Collection[str] = (), rules: Iterable[Rule] = ()
) -> tuple[list[str], list[str]]:
    """(problems, warnings): why the run cannot start, and what is set without effect.

    typed: the settings that stand on the command line. rules: beside those of this file. Of a
    sweep, each point is checked like a run.
    """
    if config.mode != "sample_eval" or config.sampling.sweep is None:
        return _check_one(config, typed, rules)
    made = sweep(config)
    found = [_check_one(each.config, {*typed, *each.keys}, rules) for each in made.points]
    problems, warnings = (_shared([pair[part] for pair in found]) for part in (0, 1))
    for point, (own, _) in zip(made.points, found, strict=True):
        if own := [problem for problem in own if problem not in problems]:
            made.problems.append(f"sampling.sweep, point {point.text}: {'; '.join(own)}")
    return made.problems + problems, warnings


def _shared(sentences: list[list[str]]) -> list[str]:
    """Those that are in every list."""
    first = sentences[0] if sentences else ()
    return [each for each in first if all(each in others for others in sentences)]


def _check_one(
    config: Config, typed: Collection[str], rules: Iterable[Rule]
) -> tuple[list[str], list[str]]:
    """check() of a run without a sweep."""
    outside = {}
    for key, leaf in LEAVES.items():
        value, limit = get(config, key), leaf.limit
        if end := unfit(value):
            outside[key] = f"{key}={value} {end}"
        elif limit is not None and value is not None and not limit.holds(value):
            hint = nearest(value, limit.names) if limit.names else ""
            outside[key] = f"{key}={value} must be {limit.words}{hint and '.'}{hint}"
    # The rules between settings go on with stand-ins; what they say about those is not repeated.
    possible = copy.deepcopy(config)
    for key in outside:
        limit, value = LEAVES[key].limit, get(config, key)
        put(possible, key, type(value)() if limit is None else limit.stand_in)
    said = [problem for rule in (*RULES, *rules) for problem in _said(rule, possible)]
    # what other settings take over from one that is typed is said of that one
    asked = {str(get(config, key)) for key in outside if key in typed}
    own = [
        key
        for key in outside
        if key in typed or not any(value in str(get(config, key)) for value in asked)
    ]
    problems = [*(outside[key] for key in own), *_without(outside, said)]
    return problems, _without(outside, without_effect(possible, typed))


def _said(rule: Rule, config: Config) -> Iterator[str]:
    """The sentences of a rule; what it cannot look at is one of them."""
    try:
        yield from rule(config)
    except CIRCUMSTANCES as error:
        yield blamed(error, config)


def _without(keys: Iterable[str], sentences: Iterable[str]) -> list[str]:
    """The sentences that are about none of these settings, each once."""
    found = re.compile("|".join(rf"\b{re.escape(key)}\b" for key in keys) or "(?!)")
    return [sentence for sentence in dict.fromkeys(sentences) if not found.search(sentence)]


def network(config: Config) -> Iterator[str]:
    model, algo = config.model, config.algo
    if model.length % config.block_size:
        yield f"block_size={config.block_size} does not divide model.length={model.length}"
    if algo.backbone == "llama" and algo.time_conditioning:
        yield (
            f"algo.backbone=llama takes no noise level, and algo={algo.name} tells it to its"
            " network: set algo.time_conditioning=False, or use algo.backbone=dit"
        )
    size, heads = f"model.hidden_size={model.hidden_size}", f"model.n_heads={model.n_heads}"
    width, rest = divmod(model.hidden_size, model.n_heads)
    if algo.backbone == "dit" and rest:
        yield f"{size} is not a multiple of {heads}"
    elif algo.backbone == "dit" and width % 2:
        yield f"{size} / {heads} is odd: rotary positions need an even width per head"
    elif algo.backbone == "llama" and not sized_by_checkpoint(config):
        if model.head_dim is None:
            yield f"{size} is not a multiple of {heads}: set model.head_dim"
        elif model.head_dim % 2:
            odd = f"model.head_dim={model.head_dim} (null: hidden_size / n_heads) is odd"
            yield f"{odd}: rotary positions need an even width per head"
        if model.n_heads % model.n_kv_heads:
            yield f"{heads} is not a multiple of model.n_kv_heads={model.n_kv_heads}"


def algorithm(config: Config) -> Iterator[str]:
    algo, blocks = config.algo, config.block_size < config.model.length
    entry = algorithms()[algo.name]
    for key in ("parameterization", "sampler"):
        if (value := getattr(algo, key)) != entry[key]:
            yield f"algo.{key}={value} does not fit algo={algo.name}, which needs {entry[key]}"
    whole = entry["noise"] and not entry["blocks"]
    windows = "steps" in entry["can"] and config.mode in ("sample_eval", "demo")
    if whole and blocks and not windows:
        yield (
            f"block_size={config.block_size}: algo={algo.name} is one block of"
            f" model.length={config.model.length}; blocks are algo=bamdlm"
        )
    if algo.time_conditioning and not entry["time_conditioning"]:
        yield (
            f"algo.time_conditioning=True: algo={algo.name} does not tell its network the noise"
            f" level, only {names_with('time_conditioning')} does; set it to False"
        )
    if needs_block_mask(config) and not algo.cross_attn:
        yield f"algo.cross_attn=False: algo={algo.name} with blocks below model.length needs it"
    for key, does in (("cross_attn", "has blocks to cross"), ("var_min", "clips its schedule")):
        if getattr(algo, key) and not entry["blocks"]:
            only = f"only {names_with('blocks')} {does}"
            yield f"algo.{key}=True does not fit algo={algo.name}: {only}"
    if algo.mdlm_loss_scale and config.noise.type != "loglinear":
        yield f"algo.mdlm_loss_scale=True is defined for noise=loglinear, not {config.noise.type}"


def batches(config: Config) -> Iterator[str]:
    loader, trainer = config.loader, config.trainer
    tokens, length = config.eval.tokens_per_batch, config.model.length
    if tokens is not None and tokens < length:
        yield f"eval.tokens_per_batch={tokens} is less than a row of model.length={length}"
    if config.mode == "ppl_eval" and trainer.limit_val_batches == 0:
        yield f"trainer.limit_val_batches={trainer.limit_val_batches} leaves nothing to evaluate"
    if config.mode not in ("train", "plan"):
        return
    devices = all_devices(config)
    at_once = loader.batch_size * devices
    total = at_once * trainer.accumulate_grad_batches
    each = f"loader.batch_size={loader.batch_size} on {devices} device{'s' * (devices > 1)}"
    wanted = f"loader.global_batch_size={loader.global_batch_size}"
    if loader.global_batch_size % at_once:
        yield f"{wanted} is not a multiple of {at_once}: {each}"
    elif total != loader.global_batch_size:
        yield (
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} with {each} makes"
            f" {total}, not {wanted}; leave it out"
        )


def machine(config: Config) -> Iterator[str]:
    trainer = config.trainer
    gpu, elsewhere = trainer.accelerator == "gpu", is_elsewhere(config)
    gpus = visible_gpus() if gpu and not elsewhere else None
    if elsewhere and not gpu:
        yield (
            f"trainer.accelerator={trainer.accelerator}: plan.gpu={config.plan.gpu} is a GPU; leave"
            " one of them out"
        )
    if gpus == 0:
        yield "trainer.accelerator=gpu: torch sees no GPU here; use trainer.accelerator=auto"
    elif gpus is not None and trainer.devices > gpus:
        yield f"trainer.devices={trainer.devices}: this machine has {gpus}"
    started = started_by_torchrun()
    if started not in (None, trainer.devices) and config.mode in DISTRIBUTED:
        yield (
            f"trainer.devices={trainer.devices}: torchrun started {started} processes here;"
            " leave trainer.devices out"
        )
    precision = f"trainer.precision={trainer.precision}"
    if trainer.precision.startswith("16") and not gpu:
        yield f"{precision} needs a GPU; a CPU can do bf16 and 32"
    if config.strategy.name == "fsdp":
        yield from _sharded(config)
    yield from _attention(config, gpu)
    yield from _compiled(config, gpu)


def _sharded(config: Config) -> Iterator[str]:
    trainer, groups = config.trainer, config.strategy.replicate
    devices = all_devices(config)
    if trainer.precision == "16-mixed":
        precision = f"trainer.precision={trainer.precision}"
        yield f"{precision} does not go with strategy=fsdp; use bf16, 32, or strategy=ddp"
    if devices == 1:
        yield "strategy=fsdp has nothing to share out on one device; use strategy=ddp"
    elif devices % groups:
        yield (
            f"strategy.replicate={groups} does not divide the {devices} devices (trainer.devices x"
            " trainer.num_nodes); use a number of groups that does"
        )
    elif groups == devices:
        yield (
            f"strategy.replicate={groups} leaves one device to a group, and nothing to share out;"
            " use fewer groups, or strategy=ddp"
        )


def _attention(config: Config, gpu: bool) -> Iterator[str]:
    """What the entry of the backend says it cannot do, and this run needs."""
    model = config.model
    entry = attention_backends().get(model.attn_backend)
    if entry is None:  # auto, a stand-in
        return
    needed = f"model.attn_backend={model.attn_backend}"
    way_out = "use model.attn_backend=sdpa or auto"
    if not gpu and not entry["cpu"]:
        yield f"{needed} needs a GPU; {way_out}"
    elif not gpu and not entry["cpu_backward"] and config.mode == "train":
        yield f"{needed} cannot train on a CPU (no backward pass); {way_out}"
    elif (
        gpu and entry["package"] and not is_elsewhere(config) and not has_package(entry["package"])
    ):
        name = entry["package"]
        yield f"{needed}: the package {name} is not installed: pip install {name}; or {way_out}"
    elif not entry["full_precision"] and not config.trainer.precision.startswith(("bf16", "16")):
        yield f"{needed} needs trainer.precision=bf16; or {way_out}"
    if gpu and not has_wide_heads(config, entry["least_head_width"]):
        llama = config.algo.backbone == "llama"
        width = "model.head_dim" if llama else "model.hidden_size / model.n_heads"
        yield (
            f"{needed} needs heads of at least {entry['least_head_width']} on a GPU, but"
            f" {width} is {head_width(config)}; {way_out}"
        )
    if needs_block_mask(config) and not entry["block_masks"]:
        yield (
            f"{needed} cannot apply the block mask of algo={config.algo.name};"
            " use model.attn_backend=flex, sdpa or auto"
        )
    if not entry["document_ids"] and not config.data.wrap:
        yield f"{needed} cannot hide padding (data.wrap=False); {way_out}"
    if not entry["document_ids"] and config.data.pack != "wrap":
        yield f"{needed} cannot keep documents apart (data.pack={config.data.pack}); {way_out}"
    if config.mode == "sample_eval" and config.sampling.kv_cache and not entry["cache"]:
        yield f"{needed} does not serve sampling.kv_cache=True; {way_out}"


def _compiled(config: Config, gpu: bool) -> Iterator[str]:
    if not config.model.compile:
        return
    if is_elsewhere(config):
        return
    if gpu and not has_package("triton"):
        yield (
            "model.compile=True: the package triton is not installed: pip install triton; or use"
            " model.compile=False"
        )
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        yield "model.compile=True needs a C++ compiler (g++, or $CXX); use model.compile=False"


def optimizer(config: Config) -> Iterator[str]:
    if config.optim.name != "muon":
        return
    if config.optim.momentum is None:
        yield "optim.momentum=null: optim=muon needs a number in [0, 1), such as 0.95"
    if config.strategy.name == "fsdp":
        yield (
            "optim=muon works on whole matrices, which strategy=fsdp shards; use strategy=ddp or"
            " optim=adamw"
        )
    if config.mode == "train" and (found := torch_version()) < MUON_SINCE:
        yield (
            f"optim=muon needs torch {'.'.join(map(str, MUON_SINCE))} or newer, here is"
            f" {'.'.join(map(str, found))}; use optim=adamw"
        )


def masters(config: Config) -> Iterator[str]:
    asked, trainer = f"model.param_dtype={config.model.param_dtype}", config.trainer
    if config.model.param_dtype == "float32" or config.mode not in ("train", "plan"):
        return
    if trainer.precision != "bf16-mixed":
        yield (
            f"{asked} needs trainer.precision=bf16-mixed, not {trainer.precision}: products are"
            " made in the format of the weights"
        )
    if config.strategy.name == "fsdp":
        yield f"{asked} does not go with strategy=fsdp, which shares out float32 weights; use ddp"
    if config.strategy.gradients == "bf16":
        yield f"{asked} does not go with strategy.gradients=bf16: its gradients are sums in float32"


def adapters(config: Config) -> Iterator[str]:
    asked = f"lora.rank={config.lora.rank}"
    if config.lora.rank is None or config.mode not in ("train", "plan"):
        return
    if config.training.from_pretrained is None:
        yield (
            f"{asked} needs weights to start from: set training.from_pretrained, or lora.rank=null"
            " to train all weights"
        )
    if config.strategy.name == "fsdp":
        yield f"{asked} does not go with strategy=fsdp, which shares out what is trained; use ddp"
    if config.optim.name == "muon":
        yield f"{asked} does not go with optim=muon, which is for whole matrices; use optim=adamw"
    if config.lora.modules == []:
        yield "lora.modules=[] names no layer; null: all linear layers of the blocks"


def optimization(config: Config) -> Iterator[str]:
    schedule, trainer = config.lr_scheduler, config.trainer
    if schedule.name == "cosine_decay_warmup":
        if schedule.num_warmup_steps >= trainer.max_steps:
            yield (
                f"lr_scheduler.num_warmup_steps={schedule.num_warmup_steps} must be below"
                f" trainer.max_steps={trainer.max_steps}"
            )
        for key in ("warmup_lr_init", "lr_min"):
            value = getattr(schedule, key)
            if value is None or value > config.optim.lr:
                yield f"lr_scheduler.{key}={value} must be at most optim.lr={config.optim.lr}"
    monitor = config.callbacks.checkpoint_monitor
    if monitor is not None and monitor.mode == "max":
        yield (
            f"callbacks.checkpoint_monitor.mode=max would keep the worst checkpoint: less"
            f" {monitor.monitor} is better; use min"
        )


def saving(config: Config) -> Iterator[str]:
    folder = config.checkpointing.save_dir
    if config.checkpointing.format == "sharded" and "://" in folder and config.mode == "train":
        yield (
            f"checkpointing.format=sharded writes to a disk alone, not to"
            f" checkpointing.save_dir={folder}: give a folder, or checkpointing.format=file"
        )


def data(config: Config) -> Iterator[str]:
    data, packed = config.data, config.data.pack != "wrap"
    entry = known_corpora().get(data.train, {})
    windows = entry.get("windows", False)
    other = f"data={entry['whole']}" if "whole" in entry else "another corpus"
    if data.streaming and windows and config.mode == "train":
        yield (
            f"data.streaming=True does not go with data.train={data.train}, random windows of"
            f" prepared rows; use {other} or data.streaming=False"
        )
    if packed and not data.wrap:
        yield (
            f"data.pack={data.pack} does not go with data.wrap=False, which gives each document a"
            " row of its own: choose one"
        )
    if packed and windows and config.mode in ("train", "plan"):
        yield (
            f"data.pack={data.pack} has no meaning for data.train={data.train}, windows of one"
            f" document; use {other} or data.pack=wrap"
        )
    framed = (data.insert_train_special or data.insert_valid_special) and data.wrap
    if framed and not packed and config.model.length <= SPECIAL_TOKENS:
        yield (
            f"model.length={config.model.length} leaves no room between BOS and EOS;"
            " set data.insert_train_special=False and data.insert_valid_special=False"
        )


def sampling(config: Config) -> Iterator[str]:
    if config.mode != "sample_eval":
        return
    sampling, name = config.sampling, config.algo.name
    if "steps" not in algorithms()[name]["can"] and sampling.steps is not None:
        yield f"sampling.steps={sampling.steps} does not fit algo={name}, which has its own"
    if not sampling.first_hitting and sampling.steps == "first_hitting":
        yield "sampling.first_hitting=False contradicts sampling.steps=first_hitting"
    if sampling.prompt is not None and sampling.prompts is not None:
        yield "sampling.prompt and sampling.prompts are both set: choose one"
    if sampling.infill and sampling.prompt is None and sampling.prompts is None:
        yield "sampling.infill=True needs sampling.prompt or sampling.prompts with [MASK] in it"
    yield from sampling_files(config)


def demo(config: Config) -> Iterator[str]:
    if config.mode != "demo":
        return
    if not config.demo.host:
        yield "demo.host= is empty: 127.0.0.1 is this machine alone, 0.0.0.0 is for all others too"
    if not has_package("gradio"):
        yield (
            "mode=demo: the package gradio is not installed; run"
            " pip install -r requirements-demo.txt"
        )


FILES = (checkpoints, corpora, chats, results)
RULES = (
    *(
        amounts,
        network,
        algorithm,
        clipping,
        counts,
        block_sizes,
        adaptation,
        batches,
        machine,
        packages,
    ),
    *(optimizer, masters, adapters, optimization, saving, data, sampling, demo),
    *FILES,
)
