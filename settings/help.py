"""The text of `python main.py --help`."""

import textwrap

from omegaconf import OmegaConf

from settings.composing import composed_yaml
from settings.keys import LEAVES, choices, groups
from settings.schema import Config
from settings.tables import modes

TITLE = """\
BAM-DLM: train, evaluate and sample block-diffusion language models (arXiv:2503.09573).

  python main.py [key=value ...]
"""
EXAMPLES = """\
A few commands
  python main.py experiment=quickstart
  python main.py experiment=quickstart mode=ppl_eval
  python main.py experiment=quickstart mode=sample_eval sampling.nucleus_p=0.9
  python main.py algo=mdlm data=files data.train=mine.txt data.valid=held_out.txt model=tiny
  python main.py mode=ppl_eval algo=bamdlm algo.backbone=hf_dit block_size=4 \\
      data=openwebtext-split data.insert_valid_special=False wandb=null \\
      eval.checkpoint_path=kuleshov-group/bamdlm-owt-block_size4
  python main.py --cfg job experiment=quickstart    # show the composed settings, do nothing

A leading + or ++ makes no difference; wandb=null turns wandb off; ~key is key=null."""
NAME_WIDTH = 48
WIDTH = 96


def full_help() -> str:
    parts = [TITLE, "Modes", *_mode_lines(), "", EXAMPLES, "", "Groups", *_group_lines(), ""]
    return "\n".join([*parts, "Settings, with their defaults", *_setting_lines()])


def _mode_lines() -> list[str]:
    found = modes()
    width = max(map(len, found))
    return [f"  mode={name:{width}}  {line}" for name, line in found.items()]


def described(key: str) -> str:
    """What a setting means, and what it may name."""
    leaf = LEAVES[key]
    named = leaf.limit is not None and leaf.limit.names
    return f"{leaf.doc} ({', '.join(leaf.limit.names)})" if named else leaf.doc


def _group_lines() -> list[str]:
    lines = []
    for group in groups():
        lines += textwrap.wrap(
            f"{group}= " + " ".join(choices(group)),
            WIDTH,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    return lines


def _setting_lines() -> list[str]:
    defaults, section, lines = OmegaConf.create(composed_yaml([])), None, []
    raw = OmegaConf.to_container(defaults, resolve=False)
    for key, leaf in LEAVES.items():
        if leaf.section is not section:
            section = leaf.section
            if section is not Config:
                lines.append("")
        value = raw
        for part in key.split("."):
            value = value[part]
        shown = f"{key}={'null' if value is None else value}"
        lines.append(f"  {shown:{NAME_WIDTH}}  {described(key)}".rstrip())
    return lines
