"""What the tests of SSD-LM's commands share."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import generate_text
from conftest import GOLDEN
from ssd_samples import read

ROOT = Path(__file__).parent.parent
MODEL = GOLDEN / "ssd_lm" / "model"
JUDGE = GOLDEN / "judge"


def command(program, *arguments):
    """Exit status, stdout, stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = program.main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            status = leaving.code
    return status, out.getvalue(), err.getvalue()


def generate(folder, *more, model=MODEL, length=12, steps=3, block=6, out="s.jsonl"):
    return command(
        generate_text,
        *("--model_name_or_path", model, "--output_dir", folder, "--out_fn", out),
        *("--max_seq_length", length, "--total_t", steps, "--decoding_block_size", block),
        *("--device", "cpu"),
        *more,
    )


def samples(folder, name="s.jsonl"):
    return read(Path(folder) / name)


def texts(folder, name="s.jsonl"):
    return [record["sampled_sequences"] for record in samples(folder, name)]
