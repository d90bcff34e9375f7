"""mode=sample_eval: write texts with a checkpoint and judge them, one CSV row for each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import lightning as L

import settings
from checkpointing.checkpoint import Checkpoint
from checkpointing.load import say_untrained, trained_sizes
from data.tokenizer import Tokenizer
from evaluation.judge import Judge, load_judge
from modes.build import build_objective, trained_module
from modes.build_data import build_cache, build_tokenizer
from modes.sampling_params import sampling_params
from noise_schedule import get_schedule
from objectives.algorithms import get_algorithm
from samplers.params import CONTEXT_TOKENS, SamplingParams, whole_blocks
from samplers.steps import STEPS
from sampling.prompts import encode_prompts, read_prompts
from sampling.run import Model, Output, SamplingRun, Texts, run_id, visible_tokens
from sampling.sample_file import SampleFile
from sampling.sweep import Sweep
from settings import Config
from settings.defaults import all_devices
from training.flops import matmul_dtype
from utils import say


def prepare(config: Config) -> Callable[[], None]:
    """Rows are shared out over the processes of srun, torchrun, or trainer.devices of this one."""
    tokenizer, precision = build_tokenizer(config), config.trainer.precision
    fabric = build_fabric(config)
    file = SampleFile(config.sampling.logdir)
    file.check()
    swept = settings.sweep(config)
    module, checkpoint = trained_module(swept.points[0].config, tokenizer)
    if precision.endswith("-mixed"):
        module.backbone.freeze(matmul_dtype(precision))
    points = build_points(swept, tokenizer, checkpoint, file)
    judge = build_judge(config, tokenizer)
    fabric.launch()
    backbone = module.to(fabric.device).eval().backbone
    runs = {}
    for name, (chosen, wanted, texts, output) in points.items():
        denoise = build_objective(chosen, tokenizer.mask_id).denoiser(backbone)
        runs[name] = SamplingRun(
            Model(chosen.algo.name, denoise, tokenizer, wanted, fabric.device),
            texts,
            output,
            judge=judge,
            rank=fabric.global_rank,
            ranks=fabric.world_size,
        )
    made = next(iter(runs.values())) if config.sampling.sweep is None else Sweep(runs)

    def run() -> None:
        if judge is not None:
            judge.model.to(fabric.device)
        with fabric.autocast():
            made.run()
        # the last one to be done reports; the command ends when all that it started have ended
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.wait()

    return run


def build_fabric(config: Config) -> L.Fabric:
    """What starts the processes and says which of them this is."""
    t = config.trainer
    strategy = "ddp" if all_devices(config) > 1 else "auto"
    placed = {"accelerator": t.accelerator, "devices": t.devices, "num_nodes": t.num_nodes}
    return L.Fabric(**placed, strategy=strategy, precision=t.precision)


def build_points(
    swept: settings.Sweep, tokenizer: Tokenizer, checkpoint: Checkpoint, file: SampleFile
) -> dict[str, tuple[Config, SamplingParams, Texts, Output]]:
    """{what is said of it: a run} of all points, those of equal rows once. ValueError names the
    point."""
    found, texts = {}, {}
    for point in swept.points:
        config = point.config
        try:
            wanted = checkpoint_params(config, tokenizer, checkpoint)
            visible = visible_tokens(config.algo.name, wanted)
            if visible not in texts:
                texts[visible] = build_texts(config, tokenizer, wanted)
        except ValueError as error:
            if not point.values:
                raise
            raise ValueError(f"sampling.sweep, point {point.text}: {error}") from error
        output = build_output(config, file, checkpoint, wanted)
        found.setdefault(output.run, (point.text, (config, wanted, texts[visible], output)))
    sizes = [config.block_size for _, (config, *_) in found.values()]
    say_untrained(trained_sizes(checkpoint, swept.points[0].config.algo.name), sizes)
    chosen = {w.window for _, (c, w, *_) in found.values() if w.window != c.block_size}
    for window in chosen:  # not what was asked for
        say(f"mdlm was trained on {window} tokens: sampling in windows of {window}")
    if swept.combinations > 1:
        same = swept.combinations - len(found)
        also = f" (of {swept.combinations}, {same} differ in nothing that is read)" if same else ""
        say(f"{len(found)} point{'s' * (len(found) > 1)} in one start{also}")
    return dict(found.values())


def build_output(
    config: Config, file: SampleFile, checkpoint: Checkpoint, wanted: SamplingParams
) -> Output:
    sampling = config.sampling
    about = {
        "checkpoint": config.eval.checkpoint_path,
        "ema": not config.eval.disable_ema,
        "precision": config.trainer.precision,
        "noise": config.noise.type,
        "judge": config.eval.gen_ppl_eval_model_name_or_path,
    }
    name = sampling_run_id(config, checkpoint, wanted)
    return Output(file, name, show=sampling.show, trajectory=sampling.trajectory, about=about)


def build_judge(config: Config, tokenizer: Tokenizer) -> Judge | None:
    """On the CPU; its special tokens are told apart from those of the writer."""
    path_or_id = config.eval.gen_ppl_eval_model_name_or_path
    if path_or_id is None:
        return None
    return load_judge(
        path_or_id,
        batch_size=config.eval.perplexity_batch_size,
        foreign=tokenizer.hf.all_special_tokens,
        cache_dir=build_cache(config).folder,
    )


def checkpoint_params(
    config: Config, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> SamplingParams:
    """What the sampler is asked for; what it sees at once is what the network was trained on."""
    window, writes = config.block_size, get_algorithm(config.algo.name).writes
    whole = window == config.model.length
    if writes == "mdlm" and whole and (checkpoint.length or window) < window:
        window = checkpoint.length
    trained = checkpoint.length or CONTEXT_TOKENS
    if writes == "bamdlm" and config.model.length > trained:
        trained = whole_blocks(trained, config.block_size)
    noise = get_schedule(config.noise.type, config.algo.mdlm_loss_scale)
    return sampling_params(
        config,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        context_size=config.sampling.context_size or trained,
        window=window,
        move_chance=lambda t: noise(t).p,
    )


def build_texts(config: Config, tokenizer: Tokenizer, wanted: SamplingParams) -> Texts:
    s = config.sampling
    texts = [] if s.prompt is None else [s.prompt]
    prompts = encode_prompts(
        texts if s.prompts is None else read_prompts(s.prompts),
        tokenizer,
        infill=s.infill,
        length=wanted.length,
        context_size=visible_tokens(config.algo.name, wanted),
    )
    return Texts(s.num_sample_batches * s.batch_size, prompts, s.infill)


def sampling_run_id(config: Config, checkpoint: Checkpoint, wanted: SamplingParams) -> str:
    """Changes with whatever changes a row; the size of the batch and of the job do not.

    A number that has `if_read` counts only where the step rule reads it, one that has `if_changed`
    only where it is not the default (see samplers/params.py).
    """
    reads = STEPS[wanted.steps].reads
    numbers = dataclasses.asdict(wanted)
    for field in dataclasses.fields(wanted):
        unread = field.metadata.get("if_read") and field.name not in reads
        unchanged = field.metadata.get("if_changed") and numbers[field.name] == field.default
        if unread or unchanged or field.name in ("batch_size", "move_chance"):
            del numbers[field.name]
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
