"""mode=demo: a page in the browser that writes texts while you look."""

import ipaddress
import socket
from collections.abc import Callable, Iterator

import lightning as L

from checkpointing.checkpoint import Checkpoint
from checkpointing.layouts import read_checkpoint
from modes.build_data import build_cache
from objectives.algorithms import get_algorithm
from samplers.params import whole_blocks
from samplers.writing import SAMPLERS
from sampling.demo_page import Page, build_app, serve
from sampling.live import Control
from sampling.notebook import Writer, load
from settings import Config
from settings.composing import composed_defaults
from settings.help import described
from settings.keys import LEAVES, get, unwrap
from settings.limits import Limit
from settings.tables import step_numbers, step_rules
from utils import say

DEFAULT_STEPS = 64  # algo.T of the page, where the command line has none
MOST_TOKENS = 1 << 14  # of a text: browsers are slow with more
MOST_STEPS = 10_000  # more could not be stopped while they are planned
ABOUT = {  # what the words of --help say too much about
    "steps": "Which masked tokens an evaluation reveals.",
    "seed": "Another number, another text.",
    "num_steps": "Steps of a block, a window or, for sedd, a text.",
    "window": "Tokens that are filled together, in windows that move by half of it.",
}
KEYS = {"num_steps": "algo.T", "seed": "seed", "window": "block_size"}


def prepare(config: Config) -> Callable[[], None]:
    listening = listen(config.demo.host, config.demo.port)
    found = read_checkpoint(config.eval.checkpoint_path)
    writer = load_writer(config, found)
    page = build_page(config, found, writer)
    host, port = listening.getsockname()[:2]
    alone = ipaddress.ip_address(host).is_loopback
    names = ["127.0.0.1", "localhost", "[::1]", config.demo.host] if alone else ["*"]
    app = build_app(page, names)

    def run() -> None:
        if not alone:
            say(f"demo.host={config.demo.host}: whoever reaches this machine can use the page")
        place = f"[{host}]" if ":" in host else host
        say(f"{page.about}\nthe page is http://{place}:{port}/ (Ctrl-C ends it)")
        serve(app, listening)

    return run


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address. ValueError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"demo.host={host}, demo.port={port}: no page can be served there ({why}); use another"
            " port, or demo.port=0 for any that is free"
        ) from error
    return listening


def load_writer(config: Config, found: Checkpoint) -> Writer:
    """As the checkpoint says of itself; what is set otherwise than by default must fit it."""
    default, size = composed_defaults(), config.block_size
    algo, tokenizer = config.algo.name, config.data.tokenizer_name_or_path
    chosen = algo != default["algo"]["name"] or (found.algo is None and algo in found.algorithms)
    algo = algo if chosen else None
    known = algo or found.algo
    blocks = known is not None and get_algorithm(known).blocks and size != config.model.length
    return load(
        found,
        algo=algo,
        block_size=size if blocks else None,
        use_ema=not config.eval.disable_ema,
        tokenizer=tokenizer if tokenizer != default["data"]["tokenizer_name_or_path"] else None,
        cache_dir=build_cache(config).folder,
        device=L.Fabric(accelerator=config.trainer.accelerator, devices=1).device,
    )


def build_page(config: Config, found: Checkpoint, writer: Writer) -> Page:
    params, most = writer.params, min(config.model.length, MOST_TOKENS)
    length = Control(
        *("model.length", "length", whole_blocks(min(params.length, most), params.block_size)),
        "Tokens of a text, the prompt included.",
        whole=True,
        limit=up_to(most),
    )
    blocks = f" of block_size={params.block_size}" * get_algorithm(writer.algo).blocks
    return Page(
        writer,
        f"{found.source}: algo={writer.algo}{blocks}, texts of {params.length} tokens in training",
        config.sampling.prompt or "",
        length,
        list(controls(config, writer)),
        second={"seed": (config.seed + 1) % 2**32},
    )


def up_to(most: int) -> Limit:
    return Limit(f"at least 1 and at most {most}", lambda value: 1 <= value <= most, 1)


def controls(config: Config, writer: Writer) -> Iterator[Control]:
    """What a text may differ in, read from the tables: the step rule and the numbers of all rules,
    then what every rule obeys."""
    can, rules = SAMPLERS[writer.writes].can, step_rules()
    readers = {}
    for name, entry in rules.items():
        for number in entry.get("reads", ()):
            readers.setdefault(number, []).append(name)
    always = [name for name in step_numbers() if name not in readers]
    if "steps" in can:
        yield control(config, "steps", config.sampling.steps or next(iter(rules)))
        for number, names in readers.items():
            yield control(config, number, rules=tuple(names))
    elif writer.writes == "sedd":
        yield control(config, "num_steps")
    if writer.writes == "mdlm":
        whole = config.block_size == config.model.length
        yield control(config, "window", writer.params.window if whole else config.block_size)
    some = {name for sampler in SAMPLERS.values() for name in sampler.can}
    for name in always:
        if name not in some or name in can:
            yield control(config, name)
    yield from (control(config, name) for name in ("nucleus_p", "seed"))


def control(config: Config, name: str, value=None, rules=None) -> Control:
    """Of a field of SamplingParams. value: at the beginning; None: that of the settings."""
    key = KEYS.get(name, f"sampling.{name}")
    leaf, about = LEAVES[key], ABOUT.get(name) or described(key)
    limit, value = leaf.limit, get(config, key) if value is None else value
    if name == "num_steps":
        value = value or DEFAULT_STEPS
        limit = up_to(MOST_STEPS)
    whole = unwrap(leaf.hint)[0] is int
    return Control(key, name, value, about, whole, limit.names if limit else (), rules, limit)
