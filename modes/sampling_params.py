"""The settings of a run as SamplingParams, and what they say about them. Imports no torch."""

from collections.abc import Iterator
from dataclasses import fields

from samplers.params import SamplingParams
from settings import Config
from settings.tables import algorithms, step_rules


def sampling_params(config: Config, **known) -> SamplingParams:
    """Fields of one name come from sampling.*. `known`: those that a setting does not tell."""
    names = {field.name for field in fields(SamplingParams)}
    same = {name: value for name, value in vars(config.sampling).items() if name in names}
    others = {
        "length": config.model.length,
        "seed": config.seed,
        "block_size": config.block_size,
        "window": config.block_size,
        "steps": config.sampling.steps or "first_hitting",
        "num_steps": config.algo.T,
    }
    return SamplingParams(**same | others | known)


def sampling_problems(config: Config) -> Iterator[str]:
    """What SamplingParams says about the settings of mode=sample_eval."""
    if config.mode != "sample_eval":
        return
    context = config.sampling.context_size or config.block_size  # the default always fits
    params = sampling_params(config, bos_id=0, eos_id=0, context_size=context)
    reads = step_rules()[params.steps].get("reads", ())
    entry = algorithms()[config.algo.name]
    yield from params.problems(entry["writes"], entry["can"], reads, config.sampling.infill)
