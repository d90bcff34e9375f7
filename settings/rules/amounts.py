"""Numbers that are possible in themselves, and more than this machine has.

What is estimated here is far below what a run takes: a run that may fit is never refused.
"""

import os
import re
from collections.abc import Iterator

from settings.defaults import sized_by_checkpoint
from settings.schema import Config

GIB = 1 << 30
# What a batch may take at least, however little this machine has: the defaults are for large ones
LARGE_MACHINE = 512 * GIB
# Least bytes of a process that loads data, of one that trains, of a text that is still to write
WORKER, PROCESS, TEXT = 64 << 20, 256 << 20, 64
# Least bytes of a weight, also of one that is trained with Muon
WEIGHT, TRAINED_WEIGHT = 4, 12
# Least bytes per token and unit of width: of each layer that the backward pass goes through, and of
# one that is left again, or of which the input is kept (mode=plan estimates 62 and more)
KEPT, PASSED = 8, 4
# Variables by which Lightning knows that processes on several machines belong together
CLUSTER = re.compile("MASTER_ADDR|SLURM_|TORCHELASTIC_|OMPI_|LSB_|KUBERNETES_")
MOST_INTERVALS = 10_000  # of a clip search; the published ones have about 80


def memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def amounts(config: Config) -> Iterator[str]:
    yield from _intervals(config)
    if config.mode == "plan":  # for another machine
        return
    nodes = config.trainer.num_nodes
    if nodes > 1 and config.mode != "prepare" and not any(map(CLUSTER.match, os.environ)):
        yield (
            f"trainer.num_nodes={nodes}: nothing has started processes on other machines; use srun"
            " or torchrun, or set MASTER_ADDR and NODE_RANK on each"
        )
    have = memory()
    for words, least in (*_processes(config), *_network(config)):
        if least > have:
            yield f"{words} need more than the {have / GIB:,.0f} GiB of memory here"
            return  # what passes through it needs more still
    for words, least in _batches(config):
        if least > max(have, LARGE_MACHINE):
            yield f"{words} need at least {least / GIB:,.0f} GiB of memory at once"


def _intervals(config: Config) -> Iterator[str]:
    algo = config.algo
    count = sum((1 - width) / algo.clip_search_delta + 1 for width in algo.clip_search_widths)
    if count > MOST_INTERVALS:
        yield (
            f"algo.clip_search_delta={algo.clip_search_delta:g} makes {count:,.0f} intervals to"
            f" search, and the most is {MOST_INTERVALS:,}: use a larger distance or fewer"
            " algo.clip_search_widths"
        )


def _processes(config: Config) -> Iterator[tuple[str, int]]:
    """(words, least bytes) of what is started."""
    trainer, workers = config.trainer, config.loader.num_workers
    yield f"loader.num_workers={workers} processes", workers * WORKER
    if trainer.accelerator == "cpu":  # GPUs are counted
        yield f"trainer.devices={trainer.devices} processes", trainer.devices * PROCESS


def _network(config: Config) -> Iterator[tuple[str, int]]:
    """(words, least bytes) of the weights."""
    model = config.model
    if config.mode == "prepare" or sized_by_checkpoint(config):
        return
    if config.algo.backbone == "llama":
        heads = 2 * (model.n_heads + model.n_kv_heads) * (model.head_dim or 1)
        per_unit = heads + 3 * model.ffn_size
        sizes = (
            f"model.hidden_size={model.hidden_size}, model.n_heads={model.n_heads},"
            f" model.head_dim={model.head_dim} and model.ffn_size={model.ffn_size}"
        )
    else:
        per_unit = 12 * model.hidden_size + model.cond_dim
        sizes = f"model.hidden_size={model.hidden_size} and model.cond_dim={model.cond_dim}"
    weights = model.n_blocks * model.hidden_size * per_unit
    trained = config.mode == "train" and config.strategy.name != "fsdp"
    yield (
        f"model.n_blocks={model.n_blocks} layers of {sizes}, {weights:,} weights,",
        weights * (TRAINED_WEIGHT if trained else WEIGHT),
    )


def _batches(config: Config) -> Iterator[tuple[str, int]]:
    """(words, least bytes) of what passes through the network at once, and of lists of rows."""
    model, loader, sampling = config.model, config.loader, config.sampling
    width = 1 if sized_by_checkpoint(config) else model.hidden_size
    rows = {}  # and bytes per token
    if config.mode == "sample_eval":
        count, size = sampling.num_sample_batches, sampling.batch_size
        words = f"sampling.num_sample_batches={count} of sampling.batch_size={size} texts"
        yield words, count * size * TEXT
        rows["sampling.batch_size"] = size, PASSED
    if config.mode in ("train", "ppl_eval"):
        rows["loader.eval_batch_size"] = loader.eval_batch_size, PASSED * width
    if config.mode == "train":
        kept = KEPT if model.activation_checkpointing == "none" else PASSED
        rows["loader.batch_size"] = loader.batch_size, kept * width * model.n_blocks
        rows["loader.global_batch_size"] = loader.global_batch_size, 1
    for key, (count, bytes_per_token) in rows.items():
        words = f"{key}={count} rows of model.length={model.length}"
        yield words, count * model.length * bytes_per_token
