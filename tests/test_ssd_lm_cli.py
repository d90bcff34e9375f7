"""SSD-LM's commands: options, files, resuming, the report, and what is refused."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import GOLDEN

sys.path.insert(0, str(Path(__file__).parent.parent / "ssd-lm"))

import generate_text
import report_genppl
import try_it
from ssd_samples import SampleFile, SamplesError, read

ROOT = Path(__file__).parent.parent
MODEL = GOLDEN / "ssd_lm" / "model"
JUDGE = GOLDEN / "judge"
REFERENCE_KEYS = {
    "avg_block_time",
    "avg_decode_step_time",
    "context_sequences",
    "sampled_sequences",
    "total_seq_time",
}


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


def test_a_sample_has_the_references_keys_and_its_evaluations(tmp_path):
    status, out, _ = generate(tmp_path, "--num_samples_to_generate", 3, length=18)
    assert status == 0
    assert "3 samples, 3 of them new" in out
    records = samples(tmp_path)
    assert [record["index"] for record in records] == [0, 1, 2]
    for record in records:
        assert record.keys() >= REFERENCE_KEYS
        assert record["nfe"] == 3 * 3  # blocks × T
        assert len(record["token_ids"]) == 18
        assert record["avg_block_time"] == pytest.approx(record["total_seq_time"] / 3)
        assert record["avg_decode_step_time"] == pytest.approx(record["total_seq_time"] / 9)


def test_the_default_command_line_decodes_1025_tokens(tmp_path):
    """The published setting but for the model and T: 41 blocks of 25."""
    status, _, _ = command(
        generate_text,
        *("--model_name_or_path", MODEL, "--output_dir", tmp_path, "--total_t", 2),
        *("--max_seq_length", 1025, "--num_samples_to_generate", 2, "--device", "cpu"),
    )
    assert status == 0
    for record in samples(tmp_path, "ssdlm_len1025_T2_seed1.jsonl"):
        assert len(record["token_ids"]) == 1025
        assert record["nfe"] == 41 * 2


def test_texts_are_the_same_one_by_one_in_batches_and_with_more_asked_for(tmp_path):
    for name, size, count in (("a", 1, 4), ("b", 3, 4), ("c", 8, 6)):
        options = ("--batch_size", size, "--num_samples_to_generate", count)
        assert generate(tmp_path, *options, out=name)[0] == 0
    assert texts(tmp_path, "a") == texts(tmp_path, "b") == texts(tmp_path, "c")[:4]
    assert generate(tmp_path, "--seed", 2, out="d")[0] == 0
    assert texts(tmp_path, "d") != texts(tmp_path, "a")[:1]


def test_a_length_between_blocks_is_cut_exactly_and_said(tmp_path):
    status, out, _ = generate(tmp_path, length=14, out="cut.jsonl")
    assert status == 0
    assert "3 blocks are decoded and the last 4 tokens cut off" in out
    assert generate(tmp_path, length=18, out="whole.jsonl")[0] == 0
    (cut,), (whole,) = samples(tmp_path, "cut.jsonl"), samples(tmp_path, "whole.jsonl")
    assert cut["token_ids"] == whole["token_ids"][:14]
    assert cut["nfe"] == whole["nfe"]


# Resuming


def test_the_same_command_completes_what_is_missing_and_then_adds_nothing(tmp_path):
    assert generate(tmp_path, "--num_samples_to_generate", 5)[0] == 0
    whole = texts(tmp_path)
    file = tmp_path / "s.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[3] + lines[0] + lines[1][:40])  # out of order, and torn
    assert generate(tmp_path, "--num_samples_to_generate", 5, "--batch_size", 2)[0] == 0
    assert texts(tmp_path) == whole
    before = file.read_bytes()
    status, out, _ = generate(tmp_path, "--num_samples_to_generate", 5)
    assert status == 0
    assert "all 5 samples are there" in out
    assert file.read_bytes() == before


def test_a_run_killed_between_batches_goes_on(tmp_path):
    """SIGKILL as soon as the first batch is on the disk; the rest is done by the same command."""
    words = ["--model_name_or_path", MODEL, "--output_dir", tmp_path, "--out_fn", "s.jsonl"]
    words += ["--max_seq_length", 12, "--decoding_block_size", 6, "--total_t", 40]
    words += ["--batch_size", 1, "--num_samples_to_generate", 3, "--device", "cpu"]
    words = [str(word) for word in words]
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "ssd-lm" / "generate_text.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline().startswith("samples 0 to 0")
    process.kill()
    process.wait()
    done = len(samples(tmp_path))
    assert 1 <= done < 3
    status, out, _ = command(generate_text, *words)
    assert status == 0
    assert f"3 samples, {3 - done} of them new" in out
    shutil.move(tmp_path / "s.jsonl", tmp_path / "resumed.jsonl")
    assert command(generate_text, *words)[0] == 0
    assert texts(tmp_path) == texts(tmp_path, "resumed.jsonl")


def test_another_runs_file_is_left_alone(tmp_path):
    assert generate(tmp_path)[0] == 0
    before = (tmp_path / "s.jsonl").read_bytes()
    status, _, err = generate(tmp_path, "--seed", 9, steps=4)
    assert status == 2
    assert "total_t 3 there, 4 here" in err
    assert "seed 1 there, 9 here" in err
    assert (tmp_path / "s.jsonl").read_bytes() == before


def test_other_weights_are_another_run(tmp_path):
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert generate(tmp_path, model=model)[0] == 0
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, _, err = generate(tmp_path, model=model)
    assert status == 2
    assert "files " in err


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    with (
        SampleFile(path, {}),
        pytest.raises(SamplesError, match="another process is writing"),
        SampleFile(path, {}),
    ):
        pass


def test_a_write_that_fails_keeps_what_is_there(tmp_path, monkeypatch):
    assert generate(tmp_path)[0] == 0
    before = texts(tmp_path)

    def full(self, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SampleFile, "append", full)
    status, _, err = generate(tmp_path, "--num_samples_to_generate", 2)
    assert status == 1
    assert "No space left on device" in err
    assert texts(tmp_path) == before


# Prompts


def test_samples_take_the_prompts_of_a_file_in_turn(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("To be\n\nnot to be, that is the question\n")
    assert generate(tmp_path, "--prompts_file", prompts, out="two")[0] == 0
    assert len(samples(tmp_path, "two")) == 2  # one per prompt
    options = ("--prompts_file", prompts, "--num_samples_to_generate", 3)
    assert generate(tmp_path, *options, out="three")[0] == 0
    records = samples(tmp_path, "three")
    bos = "<|endoftext|>"
    contexts = [record["context_sequences"] for record in records]
    assert contexts == [bos + "To be", bos + "not to be, that is the question", bos + "To be"]
    assert records[0]["sampled_sequences"] != records[2]["sampled_sequences"]
    assert texts(tmp_path, "two") == texts(tmp_path, "three")[:2]


def test_prompts_come_from_a_data_set_by_its_name(tmp_path):
    options = ("--prompts_data", "shakespeare", "--prompt_tokens", 4)
    assert generate(tmp_path, *options, "--num_samples_to_generate", 2)[0] == 0
    contexts = [record["context_sequences"] for record in samples(tmp_path)]
    assert len(set(contexts)) == 2
    import plays

    starts = list(plays.documents("validation"))[:2]
    for context, start in zip(contexts, starts, strict=True):
        assert start.startswith(context.removeprefix("<|endoftext|>"))


def test_prompts_come_from_a_file_of_texts_too(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "x"}\n{"text": "a longer text than that"}\n')
    options = ("--prompts_data", file, "--prompt_tokens", 4, "--num_samples_to_generate", 1)
    assert generate(tmp_path, *options)[0] == 0
    (record,) = samples(tmp_path)
    assert record["context_sequences"].startswith("<|endoftext|>a l")


def test_without_bos_a_text_starts_from_nothing(tmp_path):
    assert generate(tmp_path, "--no_bos")[0] == 0
    (record,) = samples(tmp_path)
    assert record["context_sequences"] is None


# The report


def test_the_report_is_the_projects_generative_perplexity(tmp_path):
    from generative import corpus_perplexity, load_judge

    assert generate(tmp_path, "--num_samples_to_generate", 4, length=30)[0] == 0
    out = tmp_path / "report.json"
    status, shown, _ = command(
        report_genppl, tmp_path / "s.jsonl", "--judge", JUDGE, "--device", "cpu", "--out", out
    )
    assert status == 0
    (row,) = json.loads(out.read_text())["files"]
    scores = load_judge(str(JUDGE)).score(texts(tmp_path))
    assert row["samples"] == 4
    assert row["gen_ppl"] == pytest.approx(corpus_perplexity(scores), rel=1e-5)
    for each, expected in zip(row["each"], scores, strict=True):
        assert each["gen_ppl"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert each["entropy"] == pytest.approx(expected.entropy)
        assert each["length"] == expected.tokens
    assert f"{row['gen_ppl']:.2f}" in shown
    assert f"{row['entropy']:.2f}" in shown


def recorded_reports():
    """Recordings of one text that the reference did not cut."""
    recorded = json.loads((GOLDEN / "metrics" / "gen_ppl.json").read_text())
    return {
        name: case
        for name, case in recorded.items()
        if len(case["texts"]) == 1 and case["tokens_shape"][1] < case["max_length"]
    }


@pytest.mark.parametrize("name", recorded_reports())
def test_the_report_meets_the_recorded_perplexity(tmp_path, name):
    case = recorded_reports()[name]
    (tmp_path / "s.json").write_text(json.dumps({"sampled_sequences": case["texts"][0]}))
    out = tmp_path / "report.json"
    options = ("--judge", JUDGE, "--device", "cpu", "--out", out)
    assert command(report_genppl, tmp_path / "s.json", *options)[0] == 0
    (row,) = json.loads(out.read_text())["files"]
    assert row["gen_ppl"] == pytest.approx(case["gen_ppl"], rel=1e-4)
    assert row["entropy"] == pytest.approx(case["gen_entropies"][0], rel=1e-5)
    assert row["length"] == case["gen_lengths"][0]


def test_without_a_judge_entropy_and_length_are_over_the_models_tokens(tmp_path):
    from generative import describe

    assert generate(tmp_path, "--num_samples_to_generate", 2)[0] == 0
    out = tmp_path / "report.json"
    status, shown, _ = command(report_genppl, tmp_path / "s.jsonl", "--judge", "none", "--out", out)
    assert status == 0
    assert "the model's own tokens" in shown
    (row,) = json.loads(out.read_text())["files"]
    assert row["gen_ppl"] is None
    for each, record in zip(row["each"], samples(tmp_path), strict=True):
        eos = record["settings"]["eos_token_id"]
        assert each["entropy"] == describe(record["token_ids"], eos).entropy
        assert each["length"] == describe(record["token_ids"], eos).tokens


def test_a_report_reads_a_list_and_a_folder(tmp_path):
    plain = [{"sampled_sequences": "to be or not to be"}, {"sampled_sequences": "a rose"}]
    (tmp_path / "list.json").write_text(json.dumps(plain))
    (tmp_path / "one.json").write_text(json.dumps(plain[0]))
    status, shown, _ = command(report_genppl, tmp_path, "--judge", JUDGE, "--device", "cpu")
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["2", "1"]


# What is refused: exit 2, one sentence, nothing written


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


# Scripts and the trial


def shell(script, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "BAMDLM", "SEEDS"))}
    done = subprocess.run(
        ["bash", ROOT / "ssd-lm" / script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=kept | environment,
    )
    return done.stdout.splitlines()


def test_the_batch_covers_seeds_lengths_and_steps():
    lines = shell("run_generate_text_batch.sh", "--dry-run")
    assert len(set(lines)) == 12 * 2 * 2
    lines = shell("run_generate_text_batch.sh", "--dry-run", "--batch_size", "25", SEEDS="5")
    asked = "--num_samples_to_generate 25 --max_seq_length 2050 --total_t 25 --seed 5"
    assert lines[-1].endswith(f"ssd-lm/generate_text.sh {asked} --batch_size 25")


def test_the_batchs_options_are_those_of_the_program():
    from ssd_options import parser

    line = shell("run_generate_text_batch.sh", "--dry-run", SEEDS="5")[0]
    args = parser().parse_args(line.split("generate_text.sh ")[1].split())
    assert (args.max_seq_length, args.total_t, args.seed) == (1025, 1000, 5)
    (line,) = shell("generate_text.sh", "--dry-run", "--seed", "3")
    assert line.endswith("-u ssd-lm/generate_text.py --seed 3")


def test_the_trial_makes_its_model_and_runs_to_the_report(tmp_path):
    status, out, _ = command(try_it, tmp_path / "tiny")
    assert status == 0
    assert "4 samples, 4 of them new" in out
    assert "gen_ppl" in out
    assert {f.name for f in (tmp_path / "tiny" / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "embed_sum_layer.pt",
        "timestep_layer.pt",
        "tokenizer.json",
    }
    assert command(try_it, tmp_path / "tiny")[1].count("all 4 samples are there") == 1
