"""What to lower where a planned run does not fit its GPUs: each way is planned in turn."""

import bisect
import copy
import itertools
from collections.abc import Callable

import settings
from modes.planning.gpus import GIB, room
from settings import Config
from settings.defaults import all_devices, sized_by_checkpoint
from settings.keys import put
from training.flops import GPUS

STRONGER = {"none": ("selective", "full"), "selective": ("full",), "full": ()}
Planned = Callable[[Config], object]  # to a Plan
Change = dict[str, object]  # {setting: its value}
Fits = Callable[[Change], bool]


def advice(config: Config, planned: Planned, limit: float) -> list[str]:
    """Lines: the changes that make the run fit in `limit` bytes per device, and GPUs on which it
    fits as it is. Single changes where one is enough, else several together."""
    found = ways(config, planned, limit)
    lines = ["to make it fit, one of these:"] if found else ["no way was found to make it fit"]
    for change in found:
        memory = planned(changed(config, change)).memory
        words = " ".join(f"{key}={value}" for key, value in change.items())
        lines.append(f"  {words}: {memory / GIB:.1f} GiB")
    needed = planned(config).memory
    larger = [name for name, gpu in GPUS.items() if needed <= room(gpu["memory"] * 1e9)]
    if larger:
        lines.append(f"  as it is, on {' or '.join(larger)}")
    return lines


def ways(config: Config, planned: Planned, limit: float) -> list[Change]:
    """Of one change each; where there is none, of two, then of three; then fewer layers as well."""

    def fits(change: Change) -> bool:
        return planned(changed(config, change)).memory <= limit

    key = "model.activation_checkpointing"
    stronger = [{key: value} for value in STRONGER[config.model.activation_checkpointing]]
    pairs = itertools.product([{}, *stronger], [{}, *sharding(config)])
    lowered = [kind | other for kind, other in pairs]
    for count in (1, 2, 3):
        found = [change for change in lowered if len(change) == count and fits(change)]
        beside = [change for change in lowered if len(change) == count - 1]
        batches = [change | largest_batch(config, change, fits) for change in beside]
        found += [change for change in batches if len(change) == count]
        if found:
            return found
    return fewer_layers(config, lowered[-1] | {"loader.batch_size": 1}, fits)


def fewer_layers(config: Config, beside: Change, fits: Fits) -> list[Change]:
    """The most layers with which it fits; nothing where none does or a checkpoint has the sizes."""
    layers = 1 if sized_by_checkpoint(config) else config.model.n_blocks
    key = "model.n_blocks"
    most = bisect.bisect_left(range(1, layers), True, key=lambda n: not fits(beside | {key: n}))
    return [beside | {key: most}] if most else []


def sharding(config: Config) -> list[Change]:
    """strategy=fsdp, where the other settings allow it."""
    change = {"strategy": "fsdp"}
    if config.strategy.name == "fsdp" or settings.check(changed(config, change))[0]:
        return []
    return [change]


def largest_batch(config: Config, beside: Change, fits: Fits) -> Change:
    """The largest loader.batch_size below that of the run with which it fits; empty: none does."""
    loader, devices = config.loader, all_devices(config)
    sizes = range(loader.batch_size - 1, 0, -1)
    whole = (size for size in sizes if loader.global_batch_size % (size * devices) == 0)
    found = ({"loader.batch_size": size} for size in whole)
    return next((change for change in found if fits(beside | change)), {})


def changed(config: Config, change: Change) -> Config:
    config = copy.deepcopy(config)
    for key, value in change.items():
        put(config, "strategy.name" if key == "strategy" else key, value)
    loader = config.loader
    at_once = loader.batch_size * all_devices(config)
    config.trainer.accumulate_grad_batches = loader.global_batch_size // at_once
    return config
