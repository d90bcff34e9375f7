"""The text of `python main.py --help`."""

import textwrap

from settings.composing import composed_defaults
from settings.keys import LEAVES, choices, groups, nested
from settings.overrides import as_typed
from settings.tables import modes

TITLE = """\
BAM-DLM: train, evaluate and sample block-diffusion language models (arXiv:2503.09573).

  python main.py [key=value ...]
"""
EXAMPLES = """\
Examples
  python main.py experiment=quickstart
  python main.py experiment=quickstart mode=ppl_eval
  python main.py experiment=quickstart mode=sample_eval sampling.nucleus_p=0.9
  python main.py algo=mdlm data=files data.train=mine.txt data.valid=held_out.txt model=tiny
  python main.py mode=ppl_eval algo=bamdlm algo.backbone=hf_dit block_size=4 \\
      data=openwebtext-split data.insert_valid_special=False wandb=null \\
      eval.checkpoint_path=kuleshov-group/bamdlm-owt-block_size4
  python main.py --cfg job experiment=quickstart    # print the settings and stop
  python main.py mode=plan model=medium plan.gpu=H100-80GB plan.nodes=4    # does it fit? how long?
  python main.py -m experiment=quickstart block_size=4,16 seed=1,2    # four runs, and a table

A + or ++ before a setting changes nothing. ~key means key=null. wandb=null turns Weights & Biases
off. With --config-dir DIR, experiment=NAME may also be DIR/experiment/NAME.yaml; the same for the
other groups."""
WIDTH = 96


def full_help() -> str:
    width = max(map(len, modes()))
    lines = [TITLE, "Modes", *(f"  mode={mode:{width}}  {does}" for mode, does in modes().items())]
    lines += ["", EXAMPLES, "", "Groups"]
    for group in groups():
        lines += _wrapped(f"{group}= {' '.join(choices(group))}")
    return "\n".join([*lines, "", "Settings, with their defaults", *_setting_lines()])


def described(key: str) -> str:
    """What a setting means and what it may be, as sentences."""
    leaf = LEAVES[key]
    words = "" if leaf.limit is None else f" {leaf.limit.words[0].upper()}{leaf.limit.words[1:]}."
    return f"{leaf.doc[0].upper()}{leaf.doc[1:]}.{words}"


def _setting_lines() -> list[str]:
    section, lines = "", []
    for key, value in defaults().items():
        lines += [""] * (key.rpartition(".")[0] != section)
        section = key.rpartition(".")[0]
        lines += [f"  {key}={value}", *_wrapped(described(key), indent=6)]
    return lines


def defaults() -> dict[str, str]:
    """{setting: what configs/ have for it, as it would be typed}, in the order of the schema."""
    composed, found = composed_defaults(), {}
    for key in LEAVES:
        found[key] = str(as_typed(nested(composed, key)))
    return found


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * 6, break_on_hyphens=False
    )
