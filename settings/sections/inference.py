"""Settings of what is done with a trained network: evaluation, sampling, the demo."""

from dataclasses import dataclass, make_dataclass
from typing import Any

import settings.tables as tables
from settings.limits import BY_WORDS, SIZES, Limit, doc, one_of

TYPES = {"int": int, "float": float}
LIKELIHOODS = Limit(
    f"made of {', '.join(tables.likelihoods())}, some with a number, such as iw:8 or threshold:0.9;"
    " a step rule that looks at the drawn token or at chance has no likelihood",
    lambda value: bool(value) and all(name.split(":")[0] in tables.likelihoods() for name in value),
    ["nelbo"],
)


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
