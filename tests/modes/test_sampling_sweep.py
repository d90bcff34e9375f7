"""sampling.sweep from the command line to the files: the rows of single commands, once each."""

import csv
import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, load_json
from runs import Run, at_call, ends_with_2, run

import main
from sampling import sample_file

MANIFEST = load_json("manifest.json")
WORDS = [
    "mode=sample_eval",
    "algo=bamdlm",
    "block_size=4",
    *(
        f"model.{name}={MANIFEST[name]}"
        for name in ("hidden_size", "cond_dim", "n_blocks", "n_heads")
    ),
    "model.length=16",
    f"eval.checkpoint_path={GOLDEN / 'checkpoints/bd3lm_bs4.ckpt'}",
    "eval.gen_ppl_eval_model_name_or_path=null",
    f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
    "trainer.accelerator=cpu",
    "sampling.batch_size=2",
    "sampling.num_sample_batches=2",
    "sampling.logdir=texts.csv",
]
SWEEP = "sampling.sweep={steps: [first_hitting, threshold], threshold: [.3, .6], temperature: [.5]}"
POINTS = (
    "steps=first_hitting temperature=0.5",
    "steps=threshold threshold=0.3 temperature=0.5",
    "steps=threshold threshold=0.6 temperature=0.5",
)
ROWS = 4  # of each

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_launch_folder")]


def rows(path="texts.csv"):
    """What the rows of each run are, in order."""
    with open(path, newline="") as file:
        return sorted((row["run"], int(row["row"]), row["samples"]) for row in csv.DictReader(file))


def alone(point):
    """The settings of a command of its own."""
    return [f"sampling.{word}" for word in point.split()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The rows of a sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = run([*WORDS, SWEEP, f"sampling.logdir={folder / 'texts.csv'}"], folder / "log")
    assert code == 0, said
    return rows(folder / "texts.csv")


def test_a_sweep_has_the_rows_of_single_commands(expected, capsys):
    assert main.main([*WORDS, *alone(POINTS[1])]) == 0  # the sweep finds its rows
    capsys.readouterr()
    assert main.main([*WORDS, SWEEP]) == 0
    said = capsys.readouterr().out
    assert said.count("nothing to do") == 1
    assert "3 points in one start (of 4, 1 differ in nothing that is read)" in said
    for number, point in enumerate(POINTS, 1):
        assert f"point {number} of 3: {point}\n" in said
        assert sum(line.startswith(f"{point} ") for line in said.splitlines()) == 2
    assert rows() == expected
    assert len(expected) == 3 * ROWS
    reports = json.loads(Path("texts.json").read_text())["runs"]
    assert {(each["steps"], each.get("threshold")) for each in reports.values()} == {
        ("first_hitting", None),
        ("threshold", 0.3),
        ("threshold", 0.6),
    }
    assert reports.keys() == {name for name, *_ in expected}
    assert {each["noise"] for each in reports.values()} == {"loglinear"}
    assert main.main([*WORDS, *alone(POINTS[2])]) == 0  # which finds those of the sweep
    assert "nothing to do" in capsys.readouterr().out
    assert rows() == expected


def half_a_row_and_killed(write):
    def act(file, data):
        write(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def test_a_sweep_that_was_killed_in_a_row_goes_on(expected, tmp_path):
    def before():
        real, calls = sample_file.write_whole, []

        def write(file, data):
            calls.append(data)  # a group of two texts, its note, the next group …
            (half_a_row_and_killed(real) if len(calls) == 7 else real)(file, data)

        sample_file.write_whole = write

    code, said = run([*WORDS, SWEEP], tmp_path / "log", before=before)
    assert code == -signal.SIGKILL, said
    assert "point 2 of 3" in said
    assert not Path("texts.csv").read_bytes().endswith(b"\n")
    code, said = run([*WORDS, SWEEP], tmp_path / "log")
    assert code == 0, said
    assert rows() == expected


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_any_time_loses_no_row(expected, tmp_path):
    killed = 0
    for delay in range(12):
        process = Run([*WORDS, SWEEP], tmp_path / "log")
        process.wait_for("texts.csv")
        time.sleep(0.05 * delay)
        if process.poll() is None:
            process.send(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed
    code, said = run([*WORDS, SWEEP], tmp_path / "log")
    assert code == 0, said
    assert rows() == expected


def test_a_full_disk_is_one_line_and_nothing_more_is_said_to_be_done(tmp_path):
    def no_room():
        raise OSError(errno.ENOSPC, "No space left on device")

    before = at_call(sample_file, "write_whole", 7, no_room)  # in the second point
    code, said = run([*WORDS, SWEEP], tmp_path / "log", before=before)
    assert code == 1
    lines = said.splitlines()
    assert lines[-1] == "texts.csv: No space left on device"
    assert [line.split("  ")[0] for line in lines if line.startswith("steps=")] == [POINTS[0]]
    assert "report:" not in said
    assert len(json.loads((tmp_path / "texts.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sampling.sweep={thresold: [0.5]}"], "there is no thresold to go through"),
        (
            ["sampling.sweep={context_size: [16, 4]}", "sampling.prompt=the work of any license"],
            "point context_size=4: prompt 1",
        ),
    ],
)
def test_a_point_that_cannot_be_is_named_and_nothing_is_written(words, said, tmp_path, capsys):
    message = ends_with_2([*WORDS, *words], capsys)
    assert said in message
    assert len(message.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []
