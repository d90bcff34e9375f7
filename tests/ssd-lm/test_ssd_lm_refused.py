"""What SSD-LM's commands refuse: exit 2, one sentence, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_genppl
from ssd_lm_tools import MODEL, ROOT, command, generate


def broken_model(tmp_path, change):
    folder = Path(shutil.copytree(MODEL, tmp_path / "broken"))
    change(folder)
    return folder


def without_layers(folder):
    (folder / "extra_layers.safetensors").unlink()
    (folder / "timestep_layer.pt").unlink()


def a_bert(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def of_another_width(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "extra_layers.safetensors"
    tensors = load_file(file)
    name = "embed_sum_layer.weight"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file)


BAD_MODELS = {
    "no layers": (without_layers, "timestep_layer.pt is missing"),
    "not roberta": (a_bert, "model_type is 'bert', SSD-LM needs 'roberta'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "other width": (of_another_width, "the model needs"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer can be loaded"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
        "the masked LM cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_broken_model_is_refused(tmp_path, case):
    change, message = BAD_MODELS[case]
    status, _, err = generate(tmp_path / "out", model=broken_model(tmp_path, change))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = {
    "unknown": (["--totl_t", 5], "there is no option --totl_t, did you mean --total_t?"),
    "no number": (["--seed", "one"], "invalid int value: 'one'"),
    "no steps": (["--total_t", 0], "--total_t=0 must be at least 1"),
    "no length": (["--max_seq_length", -1], "--max_seq_length=-1 must be at least 1"),
    "no block": (["--decoding_block_size", 0], "--decoding_block_size=0 must be at least 1"),
    "no samples": (["--num_samples_to_generate", 0], "--num_samples_to_generate=0 must be"),
    "no batch": (["--batch_size", 0], "--batch_size=0 must be at least 1"),
    "top-p": (["--projection_top_p", 1.5], "--projection_top_p=1.5 must be in (0, 1]"),
    "one-hot": (["--one_hot_value", "nan"], "--one_hot_value=nan must be a positive number"),
    "seed": (["--seed", -1], "--seed=-1 must be in 0"),
    "no model": (["--model_name_or_path", "./nowhere"], "is neither a folder nor a hub id"),
    "no tokenizer": (["--tokenizer_name", "/nowhere"], "--tokenizer_name=/nowhere is neither"),
    "no prompts": (["--prompts_file", "/nowhere.txt"], "cannot be read"),
    "empty prompts": (["--prompts_file", os.devnull], "holds no line with text"),
    "two prompts": (
        ["--prompts_file", __file__, "--prompts_data", "ptb", "--num_samples_to_generate", 1],
        "--prompts_file and --prompts_data are both given",
    ),
    "data": (
        ["--prompts_data", "shakespear", "--num_samples_to_generate", 1],
        "did you mean shakespeare?",
    ),
    "how many": (["--prompts_data", "shakespeare"], "needs --num_samples_to_generate"),
    "prompt tokens": (["--prompt_tokens", 5], "which is not given"),
    "out_fn": (["--out_fn", "a/b.jsonl"], "must be a file name"),
    "folder": (["--output_dir", __file__], "is a file, not a folder"),
    "device": (["--device", "abacus"], "--device=abacus cannot be used here"),
    "long block": (["--decoding_block_size", 60], "do not fit into the model's"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused_before_anything_is_written(tmp_path, case):
    options, message = BAD_OPTIONS[case]
    status, _, err = generate(tmp_path / "out", *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_every_problem_is_listed_at_once(tmp_path):
    status, _, err = generate(tmp_path, "--seed", -1, "--projection_top_p", 0, steps=0)
    assert status == 2
    assert err.count("\n  - ") == 3


def test_a_prompt_too_long_for_the_positions_is_refused(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n" + "long " * 100)
    status, _, err = generate(tmp_path / "out", "--prompts_file", prompts)
    assert status == 2
    assert "prompt 2 has" in err
    assert not (tmp_path / "out").exists()


BAD_REPORTS = {
    "nothing there": (["/nowhere.jsonl"], "does not exist"),
    "no folder of samples": (["empty"], "holds no file of samples"),
    "no sample yet": (["torn.jsonl"], "holds no finished sample yet"),
    "not samples": (["other.jsonl"], "is no sample"),
    "no text": (["number.jsonl"], "is no sample"),
    "no JSON": (["noise.jsonl"], "is no JSON"),
    "no tokens": (["plain.jsonl", "--judge", "none"], "only a judge can count those"),
    "batch": (["plain.jsonl", "--batch_size", "0"], "must be at least 1"),
    "out": (["plain.jsonl", "--out", "/no/where/r.json"], "its folder does not exist"),
    "judge": (["plain.jsonl", "--judge", "./nowhere"], "--judge=./nowhere cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD_REPORTS)
def test_a_bad_report_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.jsonl").write_text('{"sampled_seq')
    (tmp_path / "number.jsonl").write_text('{"sampled_sequences": 5}\n' * 2)
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "noise.jsonl").write_text("x\ny\n")
    plain = '{"sampled_sequences": "x"}\n'
    (tmp_path / "plain.jsonl").write_text(plain + plain)
    arguments, message = BAD_REPORTS[case]
    status, _, err = command(report_genppl, *arguments)
    assert status == 2
    assert message in err


def test_a_wrong_command_line_is_answered_without_torch():
    """As a real command: exit 2, no traceback, and torch was never imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "ssd-lm" / "generate_text.py", "--total_t=0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--total_t=0 must be at least 1" in done.stderr
    assert " torch\n" not in done.stderr
    assert "Traceback" not in done.stderr
