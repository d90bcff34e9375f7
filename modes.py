"""The modes of a run: train, ppl_eval, sample_eval, plan, prepare.

Each is a function `prepare_*(config) -> run`: it makes and checks everything the run needs, and
what it returns does the work. A ValueError while preparing is the user's (a file, a setting); one
while running would be ours.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L

import checkpoints
import config as settings
from build import (
    build_backbone,
    build_data,
    build_module,
    build_shape,
    build_tokenizer,
    start_from,
)
from config import Config
from diffusion import Diffusion
from fitting import build_trainer, examples_seen, resume_point, training_logs
from flops import flops, matmul_dtype
from generation import Job, questions, run_id, visible_tokens
from generative import load_judge
from metrics import Likelihood
from noise_schedule import get_schedule
from plan import prepare_plan
from prepare import prepare_data
from prompts import encode_prompts, read_prompts
from sample_file import SampleFile
from samplers import Settings
from signals import Signals
from throughput import Throughput
from tokenizer import Tokenizer
from utils import rank, say, write_json


def prepare(config: Config) -> Callable[[], None]:
    """Everything the mode needs, checked; call it to do the work. Raises ValueError, OSError."""
    return MODES[config.mode](config)


def prepare_train(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    resume = resume_point(config)
    pretrained = None
    if config.training.from_pretrained and resume is None:
        pretrained = checkpoints.read(config.training.from_pretrained)
    tokenizer = build_tokenizer(config)
    backbone = build_backbone(config, tokenizer, pretrained)
    module = build_module(config, backbone, tokenizer)
    if pretrained is not None:
        start_from(module, pretrained, config)
    data = build_data(config, tokenizer, train=True)
    run_folder = config.checkpointing.save_dir
    own = settings.local_folder(run_folder)
    signals = Signals()
    step_flops = flops(build_shape(config, backbone)).step
    trainer = build_trainer(
        config,
        loggers=training_logs(config),
        signals=signals,
        callbacks=(Throughput(step_flops, matmul_dtype(config.trainer.precision)),),
    )

    def run() -> None:
        if rank() == 0:
            settings.write_settings(config)
        if resume is not None:
            data.start_at(examples_seen(resume, config), resume.step)
            say(f"going on from step {resume.step:,} of {resume.source}")
        steps = config.trainer.max_steps
        finished = resume is not None and resume.step >= steps
        if finished:
            say(f"nothing is left to train: trainer.max_steps={steps}")
        say(f"run folder: {run_folder}" + f" (its log: {own})" * ("://" in run_folder))
        if config.trainer.enable_checkpointing:  # else nobody would read what they note
            signals.listen()
        path = None if resume is None else resume.source
        trainer.fit(module, datamodule=data, ckpt_path=path)
        if config.trainer.enable_checkpointing and not finished and trainer.global_step >= steps:
            say(f"trained to step {steps:,}; checkpoints: {run_folder}/checkpoints")

    return run


def prepare_ppl_eval(config: Config) -> Callable[[], None]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    tokenizer = build_tokenizer(config)
    module, checkpoint = trained_module(config, tokenizer)
    data = build_data(config, tokenizer, train=False)
    trainer = build_trainer(config, loggers=[])

    def run() -> None:
        started = time.monotonic()
        trainer.validate(module, datamodule=data, verbose=False)
        report_likelihood(config, checkpoint, module.validated, time.monotonic() - started)

    return run


def trained_module(
    config: Config, tokenizer: Tokenizer
) -> tuple[Diffusion, checkpoints.Checkpoint]:
    """The module with the weights of eval.checkpoint_path, averaged unless eval.disable_ema."""
    checkpoint = checkpoints.read(config.eval.checkpoint_path)
    backbone = build_backbone(config, tokenizer, checkpoint)
    checkpoints.load_into(
        backbone,
        checkpoint,
        use_ema=not config.eval.disable_ema,
        algo=config.algo.name,
        block_size=config.block_size if config.algo.name == "bamdlm" else None,
    )
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, ema=0.0))
    return build_module(config, backbone, tokenizer), checkpoint


def report_likelihood(
    config: Config, checkpoint: checkpoints.Checkpoint, found: Likelihood, seconds: float
) -> None:
    """The result as lines and, beside the run, as JSON."""
    exact = config.algo.name == "ar" or (config.block_size == 1 and config.training.eval_nll)
    summary = {
        "mode": "ppl_eval",
        "algo": config.algo.name,
        "block_size": config.block_size,
        "data": config.data.valid,
        "checkpoint": config.eval.checkpoint_path,
        "ema": not config.eval.disable_ema,
        "bound": "exact" if exact else "upper bound (NELBO)",
        "ppl": found.ppl,
        "ppl_error": found.ppl_error,
        "nll": found.nll,
        "bpd": found.bpd,
        "tokens": found.tokens,
        "rows": found.rows,
        "precision": config.trainer.precision,
        "seed": config.seed,
        "seconds": round(seconds, 1),
        "tokens_per_second": found.tokens / seconds,
    }
    if rank() != 0:
        return
    weights = checkpoint.fingerprint[:8] + ("-raw" if config.eval.disable_ema else "")
    name = f"ppl_{Path(str(config.data.valid)).stem}-{weights}.json"
    path = settings.local_folder(config.checkpointing.save_dir) / name
    say(f"{config.algo.name} on {config.data.valid} ({summary['bound']}): {found}")
    write_json(path, summary)
    say(f"{summary['tokens_per_second']:,.0f} tokens/s, {seconds:.1f} s; written to {path}")


def prepare_sample_eval(config: Config) -> Callable[[], None]:
    """Rows are shared out over the processes of srun, torchrun, or trainer.devices of this one."""
    t = config.trainer
    fabric = L.Fabric(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy="ddp" if t.devices * t.num_nodes > 1 else "auto",
        precision=t.precision,
    )
    tokenizer = build_tokenizer(config)
    module, checkpoint = trained_module(config, tokenizer)
    wanted = sampling_settings(config, tokenizer, checkpoint)
    if t.precision.endswith("-mixed"):
        module.backbone.freeze(matmul_dtype(t.precision))
    prompts = sampling_prompts(config, tokenizer, wanted)
    file = SampleFile(config.sampling.logdir)
    file.check()
    path_or_id = config.eval.gen_ppl_eval_model_name_or_path
    judge = None
    if path_or_id is not None:
        judge = load_judge(
            path_or_id,
            batch_size=config.eval.perplexity_batch_size,
            foreign=tokenizer.hf.all_special_tokens,
        )
    fabric.launch()
    job = Job(
        algo=config.algo.name,
        denoise=questions(
            module.objective, module.to(fabric.device).eval().backbone, config.algo.name
        ),
        tokenizer=tokenizer,
        settings=wanted,
        num_samples=config.sampling.num_sample_batches * config.sampling.batch_size,
        file=file,
        run_name=sampling_run_id(config, checkpoint, wanted),
        prompts=prompts,
        infill=config.sampling.infill,
        judge=judge,
        device=fabric.device,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
        about={
            "checkpoint": config.eval.checkpoint_path,
            "ema": not config.eval.disable_ema,
            "precision": t.precision,
            "judge": path_or_id,
        },
        show=config.sampling.show,
        trajectory=config.sampling.trajectory,
    )

    def run() -> None:
        if judge is not None:
            judge.model.to(fabric.device)
        with fabric.autocast():
            job.run()
        # the last one to be done reports; the command ends when all that it started have ended
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.wait()

    return run


def sampling_settings(
    config: Config, tokenizer: Tokenizer, checkpoint: checkpoints.Checkpoint
) -> Settings:
    """What the sampler is asked for; what it sees at once is what the network was trained on."""
    s, length = config.sampling, config.model.length
    window = config.block_size
    if config.algo.name == "mdlm" and window == length and (checkpoint.length or window) < window:
        window = checkpoint.length
        say(f"mdlm was trained on {window} tokens: sampling in windows of {window}")
    noise = get_schedule(config.noise.type, config.algo.mdlm_loss_scale)
    return Settings(
        length=length,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        seed=config.seed,
        batch_size=s.batch_size,
        block_size=config.block_size,
        context_size=s.context_size or checkpoint.length or 1024,
        window=window,
        steps=s.steps or "first_hitting",
        num_steps=config.algo.T,
        k=s.k,
        confidence=s.confidence,
        threshold=s.threshold,
        remask_eta=s.remask_eta,
        nucleus_p=s.nucleus_p,
        dtype=s.dtype,
        kv_cache=s.kv_cache,
        var_length=s.var_length,
        reject_low_entropy=s.reject_low_entropy,
        move_chance=lambda t: noise(t).p,
    )


def sampling_prompts(
    config: Config, tokenizer: Tokenizer, wanted: Settings
) -> list[tuple[int, ...]]:
    s = config.sampling
    texts = [] if s.prompt is None else [s.prompt]
    if s.prompts is not None:
        texts = read_prompts(s.prompts)
    return encode_prompts(
        texts,
        tokenizer,
        infill=s.infill,
        length=wanted.length,
        context_size=visible_tokens(config.algo.name, wanted),
    )


def sampling_run_id(config: Config, checkpoint: checkpoints.Checkpoint, wanted: Settings) -> str:
    """Changes with whatever changes a row; the size of the batch and of the job do not."""
    numbers = dataclasses.asdict(wanted)
    for name in ("batch_size", "move_chance"):
        del numbers[name]
    prompts = config.sampling.prompts and Path(config.sampling.prompts).read_text()
    return run_id(
        checkpoint.fingerprint,
        config.eval.disable_ema,
        config.algo.name,
        config.noise.type,
        config.algo.mdlm_loss_scale,
        numbers,
        prompts or config.sampling.prompt,
        config.sampling.infill,
        config.trainer.precision,
        config.eval.gen_ppl_eval_model_name_or_path,
    )


MODES = {
    "train": prepare_train,
    "ppl_eval": prepare_ppl_eval,
    "sample_eval": prepare_sample_eval,
    "plan": prepare_plan,
    "prepare": prepare_data,
}
