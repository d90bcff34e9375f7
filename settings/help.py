"""The text of `python main.py --help`."""

import textwrap

from omegaconf import OmegaConf

from settings.compose import composed_yaml
from settings.overrides import LEAVES, choices, groups
from settings.schema import Config

EXAMPLES = """\
BAM-DLM: train, evaluate and sample block-diffusion language models (arXiv:2503.09573).

  python main.py [key=value ...]

Modes
  mode=train        train, or go on where the same command stopped before
  mode=ppl_eval     perplexity on the validation split of data=...
  mode=sample_eval  write texts and judge them; one CSV row each
  mode=plan         memory, tokens, FLOPs and hours of that training; nothing is trained
  mode=prepare      tokenize the data of that training and stop; it goes on where it was killed

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
    parts = [EXAMPLES, "", "Groups", *_group_lines(), "", "Settings, with their defaults"]
    return "\n".join([*parts, *_setting_lines()])


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
        lines.append(f"  {shown:{NAME_WIDTH}}  {leaf.doc}".rstrip())
    return lines
