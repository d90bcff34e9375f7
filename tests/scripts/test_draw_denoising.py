"""scripts/draw_denoising.py: the picture of a text that was recorded."""

import itertools
import subprocess
import sys
from pathlib import Path

import torch
from conftest import GOLDEN

from data.tokenizer import get_tokenizer
from sampling.view import Trajectory
from scripts.draw_denoising import panel, read

ROOT = Path(__file__).parents[2]


def test_panels_show_the_text_as_it_was_after_an_evaluation(tmp_path):
    tokenizer = get_tokenizer(str(GOLDEN / "tokenizer"))
    page, mask = tmp_path / "text.html", tokenizer.mask_id
    record = Trajectory(page, tokenizer, row=0, about={})
    states = torch.tensor([[5, mask, mask, mask], [5, mask, 6, mask], [5, 7, 6, mask]])
    for before, after in itertools.pairwise(states):
        record.record(before, after)
    record.write()
    five, six, seven = (tokenizer.decode([i]) for i in (5, 6, 7))
    first, second = (panel(read(page), n, tokens=4, block_size=2) for n in (1, 2))
    assert first == [(five, "given"), ("", "later"), (six, "new"), ("", "block")]
    assert second == [(five, "given"), (seven, "new"), (six, "old"), ("", "later")]
    command = [ROOT / "scripts/draw_denoising.py", page, tmp_path / "out.png", "--block-size", "2"]
    done = subprocess.run(
        [sys.executable, *command, "--tokens", "4", "--evaluations", "1", "2", "2"], check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
