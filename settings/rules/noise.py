"""What must hold between the settings of training's noise, of blocks and of adapting a network;
rules as in checks.py."""

from collections.abc import Collection, Iterator

from settings.defaults import TRAINS, noise_block
from settings.keys import changed
from settings.rules.amounts import MOST_INTERVALS
from settings.schema import Config
from settings.tables import algorithms, names_with
from utils import listed

# settings with the values that leave them out
OF_COUNTS = {"training.counts": None, "training.count_law": "uniform", "training.views": 1}
OF_ONE_LAW = {
    "training.count_law": "uniform",
    "training.counts": None,
    "algo.clip_search_widths": [],
}
ADAPTED = {"adapt.clean": "block", "adapt.label": "same", "adapt.ar_loss": 0}


def clipping(config: Config) -> Iterator[str]:
    algo, training = config.algo, config.training
    if algo.clip_search_widths and not algo.var_min:
        yield (
            f"algo.clip_search_widths={algo.clip_search_widths} needs algo.var_min=True;"
            " [] turns the search off"
        )
    low, high = training.sampling_eps_min, training.sampling_eps_max
    if low > high:
        yield f"training.sampling_eps_min={low} is above training.sampling_eps_max={high}"
    elif training.resample and algorithms()[algo.name]["noise"] and training.noise == "times":
        yield from _impossible_shares(config, low, high)


def _has_share(low: float, high: float, block_size: int) -> bool:
    """Whether a multiple of 1/S lies in [low, high]."""
    return int(high * block_size + 1e-6) >= low * block_size - 1e-6


def _impossible_shares(config: Config, low: float, high: float) -> Iterator[str]:
    size, delta = config.block_size, config.algo.clip_search_delta
    if not _has_share(low, high, size):
        yield (
            f"training.resample=True: no multiple of 1/{size} lies in [{low:g}, {high:g}]; widen"
            " training.sampling_eps_min and sampling_eps_max"
        )
    if config.algo.fix_clipping or size == 1:
        return
    for width in config.algo.clip_search_widths:
        if (1 - width) / delta > MOST_INTERVALS:  # refused already
            continue
        starts = range(int((1 - width) / delta + 1e-6) + 1)
        if not all(_has_share(i * delta, i * delta + width, size) for i in starts):
            yield (
                f"algo.clip_search_widths: {width:g} is narrower than 1/{size}, the share of one"
                " token, so training.resample=True may find no mask; leave it out"
            )


def counts(config: Config) -> Iterator[str]:
    """What needs training.noise=counts, and what goes with it."""
    training, name = config.training, config.algo.name
    entry = algorithms()[name]
    drawn = training.noise == "counts" and entry["noise"]
    if drawn and not entry["counts"]:
        yield (
            f"training.noise=counts does not fit algo={name}, only {names_with('counts')}; use"
            " training.noise=times"
        )
        return
    if drawn and training.resample:
        yield (
            "training.resample=True has no meaning with training.noise=counts, which draws how"
            " many tokens are masked: training.counts bounds that; set training.resample=False"
        )
    if training.noise != "counts":
        for key, value in changed(config, OF_COUNTS).items():
            yield f"{key}={value} needs training.noise=counts"
    if drawn:
        yield from _law(config)
    if drawn and training.views > 1:
        yield from _views(config)


def _law(config: Config) -> Iterator[str]:
    """How counts are drawn: all alike, from a range, as learnt, or from a range that is searched.
    The last two are found by validation."""
    training, size, by = config.training, noise_block(config), config.eval.likelihood[0]
    bounds = training.counts
    if bounds is not None and bounds[1] > size:
        yield f"training.counts={bounds} is more than the {size} tokens of a block"
    learnt = "training.count_law=learnt" if training.count_law == "learnt" else None
    widths = config.algo.clip_search_widths
    searched = f"algo.clip_search_widths={widths}" if widths else None
    if learnt and bounds is not None:
        yield f"{learnt} draws all counts: leave training.counts={bounds} out"
    if learnt and searched:
        yield f"{learnt} does not go with {searched}: choose one"
    asked = learnt or searched
    if asked and size == 1:
        yield f"{asked}: a block of one token has one count only"
    elif asked and config.mode == "train" and by != "counts":
        yield (
            f"{asked} with training.noise=counts is found by the validation's counts, not by"
            f" eval.likelihood={by}; use eval.likelihood=counts"
        )


def block_sizes(config: Config) -> Iterator[str]:
    """What training on several block sizes goes with, at once or one after the other, and measuring
    at several. Modes that do neither do not read them."""
    if config.mode == "ppl_eval":
        sizes = config.eval.block_sizes
        yield from _sizes_fit(config, f"eval.block_sizes={sizes}", sizes or ())
    if config.mode not in TRAINS:
        return
    drawn, grown = config.training.block_sizes, config.training.block_schedule
    given = f"training.block_sizes={drawn}", f"training.block_schedule={grown}"
    if grown is not None:
        yield from _trained_sizes(config, given[1], dict.fromkeys(grown.values()))
    if drawn is not None:
        yield from _trained_sizes(config, given[0], drawn)
    if None not in (drawn, grown) and algorithms()[config.algo.name]["blocks"]:
        yield f"{given[1]} does not go with {given[0]}: choose one"


def _trained_sizes(config: Config, given: str, sizes: Collection[int]) -> Iterator[str]:
    unfit = list(_sizes_fit(config, given, sizes))
    yield from unfit
    if not algorithms()[config.algo.name]["blocks"]:
        return
    if not unfit and config.block_size not in sizes:
        yield (
            f"block_size={config.block_size} is that of validation, and {given} does not train it:"
            f" set block_size to {' or '.join(map(str, sizes))}"
        )
    alone = {**OF_ONE_LAW, "training.views": 1, "training.resample": False}
    for key, value in changed(config, alone).items():
        yield f"{given} does not go with {key}={value}, which is of one block size: choose one"


def _sizes_fit(config: Config, given: str, sizes: Collection[int]) -> Iterator[str]:
    name, length = config.algo.name, config.model.length
    if sizes and not algorithms()[name]["blocks"]:
        yield f"{given} does not fit algo={name}, only {names_with('blocks')}; leave it out"
    elif odd := [size for size in sizes if length % size]:
        yield f"{given}: {listed(odd)} does not divide model.length={length}"


def adaptation(config: Config) -> Iterator[str]:
    """What adapt.* goes with."""
    adapt, name = config.adapt, config.algo.name
    if not algorithms()[name]["blocks"]:
        with_blocks = f"only {names_with('blocks')}; leave it out"
        for key, value in changed(config, ADAPTED).items():
            yield f"{key}={value} does not fit algo={name}, {with_blocks}"
        return
    if adapt.ar_loss and adapt.clean != "causal":
        yield (
            f"adapt.ar_loss={adapt.ar_loss} needs adapt.clean=causal: with"
            f" adapt.clean={adapt.clean} a clean token sees the one that it would predict"
        )
    if adapt.label != "next":
        return
    if not config.algo.ignore_bos:
        yield (
            "adapt.label=next predicts a token at the one before it, and the first of a row has"
            " none: set algo.ignore_bos=True, which never masks it"
        )
    context, least = config.sampling.context_size, 2 * config.block_size
    sees = config.mode == "sample_eval" and context is not None
    if sees and context < min(least, config.model.length):
        yield (
            f"sampling.context_size={context}: with adapt.label=next a block sees the one before"
            f" it, so it must be at least {least}"
        )


def _views(config: Config) -> Iterator[str]:
    """What goes with two views of a row."""
    training, algo, blocks = config.training, config.algo, config.block_size
    views = f"training.views={training.views}"
    if not algorithms()[algo.name]["blocks"] or blocks == config.model.length:
        yield f"{views} share the clean half, which only algo=bamdlm in blocks of several has"
    elif blocks == 1:
        yield f"{views}: with block_size=1 one of them would always be empty"
    for key, value in changed(config, OF_ONE_LAW).items():
        yield f"{views} have a law of their own, without {key}={value}: choose one"
