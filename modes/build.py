"""From settings to objects: the network, its objective, the shape that its cost depends on.

Only this file, the modes and training/trainer.py read the configuration of a run.
"""

import dataclasses
from collections.abc import Callable

import torch

from checkpointing.as_trained import check_as_trained, streams_version
from checkpointing.checkpoint import Checkpoint
from checkpointing.layouts import read_checkpoint
from checkpointing.load import build_network, is_llama, load_into, load_pretrained
from checkpointing.restricted_pickle import CheckpointError
from checkpointing.trained import fits_vocabulary
from checkpointing.vocabulary import with_mask
from data.tokenizer import Tokenizer
from diffusion import ClippingSettings, Diffusion, NoiseSettings
from models.adaptation import Adaptation
from models.dit import DiT
from models.llama import Llama
from models.network import Network
from noise_schedule import get_schedule
from objectives import algorithms
from objectives.algorithms import ObjectiveSettings
from objectives.counts import CountLaw, to_learn, within
from objectives.loss import Objective
from objectives.sizes import SizeLaw, shares_of_steps
from random_streams import VERSION, seed_of
from settings import Config, local_folder
from settings.defaults import default_likelihood, noise_block
from settings.rules.effects import OF_LLAMA
from training.flops import NetworkShape
from training.health import StepHealth
from training.lr_schedules import lr_factor
from training.optimizers import OptimizerSettings, trained
from utils import say


def read_weights(config: Config, path: str, tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint at `path`, with a row for the mask. CheckpointError where it holds another
    network than algo.backbone says."""
    checkpoint = read_checkpoint(path)
    wanted, theirs = config.algo.backbone, "llama" if is_llama(checkpoint) else "dit"
    if theirs != wanted.removeprefix("hf_"):
        raise CheckpointError(
            f"{path} holds weights of the network {theirs}, and algo.backbone={wanted}: set"
            f" algo.backbone={theirs}"
        )
    checkpoint, done = with_mask(checkpoint, tokenizer, config.data.tokenizer_name_or_path)
    if done is not None:
        say(done)
    longest = checkpoint.config.get("max_position_embeddings")
    if type(longest) is int and config.model.length > longest:
        say(f"model.length={config.model.length}: the network was trained on {longest} positions")
    return checkpoint


def build_backbone(config: Config, tokenizer: Tokenizer, checkpoint: Checkpoint | None) -> Network:
    """The network of model.*; with algo.backbone=hf_dit that of the checkpoint, with llama too
    where there is one."""
    model = config.model
    options = {
        "dropout": model.dropout,
        "attn_backend": model.attn_backend,
        "compile": model.compile,
        "activation_checkpointing": model.activation_checkpointing,
    }
    if config.algo.backbone == "hf_dit" or (config.algo.backbone == "llama" and checkpoint):
        network = build_network(checkpoint, **options)
        if not fits_vocabulary(checkpoint, network, tokenizer):
            raise ValueError(
                f"{checkpoint.source} has a vocabulary of {network.vocab_size} ids, the tokenizer"
                f" {config.data.tokenizer_name_or_path} of {tokenizer.vocab_size} (mask included);"
                " set data.tokenizer_name_or_path to the one it was trained with"
            )
        try:
            network.check_length(model.length)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.source}: {error}") from None
        return network
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "n_blocks": model.n_blocks,
        "n_heads": model.n_heads,
    }
    if config.algo.backbone == "llama":
        return Llama(**sizes, **{name: getattr(model, name) for name in OF_LLAMA}, **options)
    adaln = algorithms.get_algorithm(config.algo.name).noise or model.adaln
    return DiT(**sizes, cond_dim=model.cond_dim, adaln=adaln, **options)


def build_objective(config: Config, mask_id: int) -> Objective:
    algo, training = config.algo, config.training
    settings = ObjectiveSettings(
        mask_id,
        get_schedule(config.noise.type, algo.mdlm_loss_scale),
        config.block_size,
        config.model.length,
        ignore_bos=algo.ignore_bos,
        time_conditioning=algo.time_conditioning,
        resample=training.resample,
        full_from=training.sampling_eps,
        sizes=build_sizes(config),
        adapt=Adaptation.named(config.adapt.clean, config.adapt.label),
        ar_loss=config.adapt.ar_loss,
    )
    return algorithms.build_objective(algo.name, settings)


def build_module(
    config: Config, backbone: Network, tokenizer: Tokenizer, version: int = VERSION
) -> Diffusion:
    """version: of the random streams; a run goes on with the one it began with."""
    algo, training = config.algo, config.training
    widths = tuple(algo.clip_search_widths)
    searched = ClippingSettings(widths, algo.clip_search_delta, algo.fix_clipping)
    return Diffusion(
        backbone=backbone,
        objective=build_objective(config, tokenizer.mask_id),
        noise=build_noise(config, version),
        optimizer=optimizer_settings(config),
        lr_factor=build_lr_factor(config),
        ema_decay=training.ema,
        clip=searched if algo.var_min else None,
        exact_nll=default_likelihood(config) == "exact",
        validate_by=config.eval.likelihood[0],
        pad_apart=not config.data.wrap,
        pin_memory=config.loader.pin_memory,
        health=StepHealth(training.max_bad_steps, str(local_folder(config.checkpointing.save_dir))),
        description=description(config, tokenizer, backbone),
    )


def build_noise(config: Config, version: int) -> NoiseSettings:
    training = config.training
    return NoiseSettings(
        seed=seed_of(config.seed, version),
        interval=(training.sampling_eps_min, training.sampling_eps_max),
        sampling_eps=training.sampling_eps,
        antithetic=training.antithetic_sampling,
        global_batch=config.loader.global_batch_size,
        eval_global_batch=config.loader.eval_global_batch_size,
        counts=build_counts(config),
        learn_counts=training.count_law == "learnt",
        views=training.views,
        block_schedule=training.block_schedule or {},
    )


def optimizer_settings(config: Config) -> OptimizerSettings:
    optim = config.optim
    betas = optim.beta1, optim.beta2
    adamw = {"lr": optim.lr, "betas": betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return OptimizerSettings(
        adamw,
        momentum=optim.momentum if optim.name == "muon" else None,
        masters=config.model.param_dtype == "bfloat16",
    )


def build_lr_factor(config: Config) -> Callable[[int], float]:
    schedule = config.lr_scheduler
    return lr_factor(
        schedule.name,
        lr=config.optim.lr,
        max_steps=config.trainer.max_steps,
        warmup_steps=schedule.num_warmup_steps,
        lr_init=schedule.warmup_lr_init,
        lr_min=schedule.lr_min,
    )


def build_sizes(config: Config) -> SizeLaw | None:
    """By which law each row draws the size of its blocks in training."""
    sizes = config.training.block_sizes
    return None if sizes is None else SizeLaw(tuple(sizes), tuple(sizes.values()))


def build_counts(config: Config) -> CountLaw | None:
    """The law that training.noise=counts begins with."""
    training, size = config.training, noise_block(config)
    if training.noise != "counts" or not algorithms.get_algorithm(config.algo.name).counts:
        return None
    if training.count_law == "learnt":
        return to_learn(size)
    if training.block_sizes is not None or training.block_schedule is not None:
        return within(1, 1, 1)  # all counts of a block of any size
    return within(*(training.counts or (1, size)), size)


def description(config: Config, tokenizer: Tokenizer, backbone: Network) -> dict:
    """What a checkpoint says about the run beside its weights."""
    about = {
        "name_or_path": config.data.tokenizer_name_or_path,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "mask_id": tokenizer.mask_id,
    }
    about = {"config": dataclasses.asdict(config), "tokenizer": about}
    if isinstance(backbone, Llama):  # which model.* need not describe
        about["llama"] = dataclasses.asdict(backbone.shape)
    return about


def start_from(module: Diffusion, checkpoint: Checkpoint, config: Config) -> None:
    """training.from_pretrained: weights and, where the file has one, the EMA; nothing else."""
    taken = load_pretrained(module.backbone, checkpoint, algo=config.algo.name)
    say(f"starting from the weights of {checkpoint.source}")
    if taken.new_keys:
        say(f"new in this run: {', '.join(taken.new_keys)}")
    if module.ema is not None:
        weights = {name: p.detach() for name, p in module.backbone.named_parameters()}
        module.ema.load(taken.ema or weights, taken.ema_updates)


def trained_module(config: Config, tokenizer: Tokenizer) -> tuple[Diffusion, Checkpoint]:
    """The module with the weights of eval.checkpoint_path, averaged unless eval.disable_ema."""
    checkpoint = read_weights(config, config.eval.checkpoint_path, tokenizer)
    check_as_trained(checkpoint, config, tokenizer, config.data.tokenizer_name_or_path)
    backbone = build_backbone(config, tokenizer, checkpoint)
    algo = "ar" if reads_as_ar(config, checkpoint) else config.algo.name
    load_into(backbone, checkpoint, use_ema=not config.eval.disable_ema, algo=algo)
    return evaluated_module(config, backbone, tokenizer, checkpoint), checkpoint


def reads_as_ar(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether an AR network is asked as block diffusion before it is adapted. Where clean tokens
    see, and predictions are read, as it was trained, blocks of one are its own likelihood."""
    adapt, weights = config.adapt, checkpoint.algorithms
    alike = (adapt.clean, adapt.label) == ("causal", "next")
    return alike and config.algo.name == "bamdlm" and weights == ("ar",) and is_llama(checkpoint)


def evaluated_module(
    config: Config, backbone: DiT, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> Diffusion:
    """Of a network that has the weights of the checkpoint already."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, ema=0.0))
    return build_module(config, backbone, tokenizer, streams_version(checkpoint))


def build_shape(config: Config, backbone: Network) -> NetworkShape:
    """What the cost of training depends on."""
    algo, training = config.algo, config.training
    law, share = build_counts(config), 1.0
    drawn = training.block_sizes
    if training.block_schedule is not None:
        drawn = shares_of_steps(training.block_schedule, config.trainer.max_steps)
    sizes = drawn or {noise_block(config): 1.0}
    if law is not None and training.views == 1:
        share = sum(weight * expected_share(law, size) for size, weight in sizes.items())
    elif law is None and algorithms.get_algorithm(algo.name).noise:
        low, high = training.sampling_eps_min, training.sampling_eps_max
        times = torch.linspace(low, high, 1001, dtype=torch.float64)
        schedule = get_schedule(config.noise.type, algo.mdlm_loss_scale)
        share = float(schedule(times).p.mean())
    return NetworkShape(
        algo=algo.name,
        hidden_size=backbone.hidden_size,
        n_blocks=len(backbone.blocks),
        vocab_size=backbone.vocab_size,
        length=config.model.length,
        block_size=config.block_size,
        masked_share=share,
        views=training.views,
        sizes=drawn,
        causal_clean=config.adapt.clean == "causal",
        answers_clean=config.adapt.label == "next" or config.adapt.ar_loss > 0,
        ar_loss=config.adapt.ar_loss > 0,
        adapters=None if config.lora.rank is None else adapter_weights(backbone),
        **_layers(backbone),
    )


def adapter_weights(backbone: Network) -> int:
    """Of the adapters of a layer; without those of the modulation, which has one row a batch."""
    named = trained(backbone.blocks[0])
    return sum(p.numel() for name, p in named if "adaLN_modulation" not in name)


def expected_share(law: CountLaw, size: int) -> float:
    """Of a block of `size` tokens that the law masks, on average."""
    m = torch.arange(1, size + 1)
    return float((m * law.chance(m, torch.tensor(size))).sum() / size)


def _layers(backbone: Network) -> dict:
    """Widths of NetworkShape that are not the DiT's."""
    if not isinstance(backbone, Llama):
        return {}
    shape = backbone.shape
    return {
        "query_width": shape.n_heads * shape.head_dim,
        "key_width": shape.n_kv_heads * shape.head_dim,
        "mlp_weights": 3 * shape.hidden_size * shape.ffn_size,
        "qk_norm": shape.qk_norm,
    }
