"""The table at the end of benchmarks/gpu.sh: what is wrong, what is missed, what did not end."""

import json
import re

import pytest

from benchmarks import gpu_table

STEP = {"mfu": 0.4, "peak": 7.5e14, "seconds": 0.1, "memory_gib": 20.0}
SEVERAL = {"tokens_per_second": 1.0, "mfu": 0.4, "memory_gib": 20.0, "alone": [0.5, 0.6]}
RIGHT = {
    "check": {"check": {"flex": {"gap": 1e-6, "limit": 1e-3, "right": True}}, "wrong": []},
    "train": {
        "train": {
            name: STEP | {"tokens_per_second": aim, "largest_batch": 128, "capacity_gib": 77.0}
            for name, aim in gpu_table.TRAINED.items()
        }
    },
    "sample": {
        "sample": {
            "one": {"tokens_per_second": gpu_table.SAMPLED},
            "many": {"tokens_per_second": 1.0, "seconds": [gpu_table.SECONDS_FOR_512]},
            "cost_ratio": 1.0,
        }
    },
    "parallel": {
        "parallel": {"1 text, threshold": {"tokens_per_second": 9.0, "tokens_per_evaluation": 16.0}}
    },
    "several": {
        "several": {"ddp on 2": SEVERAL | {"efficiency": 0.9}, "xl ddp on 2": {"left_out": "full"}}
    },
}
TESTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one">{of_one}<properties>
<property name="error" value="0.5"/></properties></testcase>
<testcase classname="tests.test_a" name="test_two">{of_two}</testcase>
</testsuite></testsuites>"""


def table(folder, capsys, changes=(), of_one="", of_two="", **parts):
    """(exit code with --check, the lines, the JSON) of `RIGHT` with other parts."""
    for name, entry in (RIGHT | parts).items():
        ended = {"device": "H100", "torch": "2", "missed": []}
        (folder / f"gpu_{name}.json").write_text(json.dumps(ended | entry))
    (folder / "gpu_tests.xml").write_text(TESTS.format(of_one=of_one, of_two=of_two))
    for name in changes:
        (folder / f"gpu_{name}").write_text("")
    code = gpu_table.main([str(folder), *RIGHT, "tests", "--check"])
    *lines, last = capsys.readouterr().out.splitlines()
    return code, lines, json.loads(last)


def test_all_right(tmp_path, capsys):
    code, lines, found = table(tmp_path, capsys, of_two="<skipped/>")
    assert code == 0
    assert lines[-1] == "nothing wrong, nothing missed"
    assert found["train"] == RIGHT["train"]["train"]
    assert any(line.split() == ["pytest", "1", "passed,", "1", "skipped"] for line in lines)
    assert any(re.fullmatch(r"1 text, threshold +9 tokens/s, 16.0 tokens an .*", x) for x in lines)
    assert any(line.split() == ["error,", "at", "most", "5.0e-01"] for line in lines)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"of_two": "<failure/>"}, "WRONG: test tests.test_a::test_two"),
        ({"of_one": "<skipped/>", "of_two": "<skipped/>"}, "WRONG: tests: not one passed"),
        ({"changes": ["tests.xml"]}, "WRONG: tests ended early"),
        ({"check": {"wrong": ["flex"]}}, "WRONG: flex"),
        ({"train": {"train": {"ar": {"failed": "a fault"}}}}, "WRONG: ar: a fault"),
        ({"train": {"train": {"ar": {"left_out": "no time left"}}}}, "missed: ar: no time left"),
        (
            {"train": {"train": {gpu_table.AIMED: STEP | {"tokens_per_second": 9.0}}}},
            f"missed: {gpu_table.AIMED}: 9 tokens/s, wanted 300,000",
        ),
        (
            {"train": {"train": {"bamdlm 16 flex": STEP | {"tokens_per_second": 9.0}}}},
            "missed: bamdlm 16 flex: 9 tokens/s, wanted 175,000",
        ),
        (
            {
                "train": {
                    "train": {
                        gpu_table.AIMED: STEP
                        | {"tokens_per_second": 3e5, "largest_batch": 200, "capacity_gib": 140.0}
                    }
                }
            },
            f"missed: {gpu_table.AIMED}: batch 111 in 77.5 GiB, wanted 128",
        ),
        (
            {
                "train": {
                    "train": {"ar": STEP | {"tokens_per_second": 9.0, "largest_batch": "no time"}}
                }
            },
            "missed: ar, largest batch: no time",
        ),
        (
            {"sample": {"sample": {"one": {"tokens_per_second": 9.0}}}},
            "missed: one text: 9 tokens/s, wanted 2,500",
        ),
        (
            {"several": {"several": {"ddp on 2": SEVERAL | {"efficiency": 0.875}}}},
            "missed: ddp on 2: efficiency 0.875, wanted 0.9",
        ),
        (
            {"several": {"several": {"fsdp on 2": {"left_out": "out of memory"}}}},
            "missed: fsdp on 2: out of memory",
        ),
    ],
)
def test_what_is_wrong_or_missed_is_said(changes, told, tmp_path, capsys):
    code, lines, _ = table(tmp_path, capsys, **changes)
    assert code == 1
    assert told in lines


def test_what_a_part_had_measured_before_it_was_ended_is_shown(tmp_path, capsys):
    table(tmp_path, capsys)
    path = tmp_path / "gpu_train.json"
    unfinished = json.loads(path.read_text())
    del unfinished["missed"]
    path.write_text(json.dumps(unfinished))
    assert gpu_table.main([str(tmp_path), "train"]) == 1
    text = capsys.readouterr().out
    assert "WRONG: train ended early" in text
    assert "300,000 tokens/s" in text
    assert gpu_table.main([str(tmp_path), "nothing"]) == 1
    assert "WRONG: nothing ended early" in capsys.readouterr().out
