"""The CSV of a sampling run and its report: many rows, many processes, many runs."""

import csv
import io
import itertools
import json
import multiprocessing
import random
from pathlib import Path

import pytest
from runs import ALGORITHMS

from samplers.params import SamplingParams
from samplers.steps import STEPS
from sampling.csv_records import cells, records
from sampling.report import made_with
from sampling.sample_file import COLUMNS, SampleFile, SampleRow


def sample(row, text="text", run="a", **made):
    return SampleRow(None, 4, 1.0, 8, text, 1, row, run, made)


def written(*rows) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


# ---- the reader ----------------------------------------------------------------------------------


def test_records_are_read_as_csv_reads_them():
    draw = random.Random(1)
    rows = [
        ["".join(draw.choices('ab,"\r\n é', k=draw.randrange(7))) for _ in range(3)]
        for _ in range(500)
    ]
    content = written(*rows)
    assert [cells(record) for record in records(io.BytesIO(content))] == rows
    assert b"".join(records(io.BytesIO(content))) == content


def test_only_whole_records_are_read():
    rows = [["a", 'x\r\ny"', "b"], ["c", 'd"\r\n"', ""], ["", "e,", "f"]]
    content = written(*rows)
    ends = [*itertools.accumulate(len(written(row)) for row in rows)]
    for cut in range(len(content) + 1):
        found = [*records(io.BytesIO(content[:cut]))]
        assert len(found) == sum(end <= cut for end in ends)
        assert b"".join(found) == content[: ([0, *ends])[len(found)]]


@pytest.mark.parametrize("record", [b'a,b"c",d\n', b'"a"b,c\n', b'"a" ,b"\n'])
def test_quotes_inside_a_bare_cell_are_no_csv(record):
    with pytest.raises(ValueError, match="has a quote that is not doubled"):
        cells(record)


def test_a_text_of_any_length_is_read_and_the_limit_of_others_stays(tmp_path):
    limit = csv.field_size_limit()
    text = 'a "long", line\r\n' * 50_000  # 800 000 characters
    file = SampleFile(tmp_path / "x.csv")
    file.add([sample(0, text), sample(1)], {})
    again = SampleFile(tmp_path / "x.csv")
    again.check()
    assert again.rows("a")[0].samples == text
    again.add([sample(0, text), sample(2)], {})
    assert [row.row for row in again] == [0, 1, 2]
    assert csv.field_size_limit() == limit < len(text)


# ---- adding --------------------------------------------------------------------------------------


def read_by_this_process() -> int:
    """Bytes that it has read so far, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def cost(act) -> int:
    before = read_by_this_process()
    act()
    return read_by_this_process() - before


def test_a_row_costs_the_same_however_many_there_are(tmp_path):
    file, text = SampleFile(tmp_path / "x.csv"), "x" * 1000
    file.add([sample(0, text)], {})
    second = cost(lambda: file.add([sample(1, text)], {}))
    SampleFile(file.path).add([sample(row, text) for row in range(2, 6000)], {})
    assert file.path.stat().st_size > 6_000_000
    file.add([sample(6000, text)], {})  # reads what the other has added
    assert cost(lambda: file.add([sample(6001, text)], {})) <= second < 5000  # that has the header
    assert len(file.numbers("a")) == 6002


def _add(path, rank, ranks, count):
    file = SampleFile(path)
    for row in range(rank, count, ranks):
        file.add([sample(row, f"text {row}, of\n{rank}")], {"rows": 1, "rank": rank})


def added_by(path, ranks, count):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_add, args=(path, rank, ranks, count)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_eight_processes_lose_and_double_no_row(tmp_path, count):
    path = tmp_path / "x.csv"
    added_by(path, 8, count)
    rows = [*SampleFile(path)]
    assert sorted(row.row for row in rows) == list(range(count))
    assert all(row.samples == f"text {row.row}, of\n{row.row % 8}" for row in rows)
    assert len(SampleFile(path).notes("a")) == count


def test_a_process_sees_what_others_add_and_adds_it_not_again(tmp_path):
    one, other = SampleFile(tmp_path / "x.csv"), SampleFile(tmp_path / "x.csv")
    one.add([sample(0), sample(1)], {})
    other.add([sample(1, "another"), sample(2)], {})
    one.add([sample(2, "another"), sample(1, run="b")], {})
    assert one.numbers("a") == other.numbers("a") == {0, 1, 2}
    assert {row.samples for row in one} == {"text"}
    assert other.numbers("b") == {1}


def test_a_file_that_is_deleted_or_cut_is_begun_again(tmp_path):
    file = SampleFile(tmp_path / "x.csv")
    file.add([sample(row) for row in range(3)], {})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-4])  # the last row is torn
    file.add([sample(3)], {})
    assert [row.row for row in file] == [0, 1, 3]
    assert file.numbers("a") == {0, 1, 3}
    file.path.unlink()
    file.add([sample(4)], {})
    assert [row.row for row in file] == [4]
    assert file.rows("a") == {4: sample(4)}
    file.path.write_bytes(whole[:20])
    assert file.numbers("a") == set()


@pytest.mark.parametrize(
    "content", [b"\x00\x01\x02" * 50, b"my notes", b'a,"\n', ",".join(COLUMNS).encode() + b",run\n"]
)
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.csv is not a file of samples"):
        SampleFile(path).check()
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"]
    assert path.read_bytes() == content


# ---- columns -------------------------------------------------------------------------------------


def test_a_file_of_an_older_version_keeps_its_columns_and_its_rows(tmp_path):
    path = tmp_path / "x.csv"
    old = written(COLUMNS, ("", 4, 1.0, 8, "text, old", 1, 0, "a"))
    path.write_bytes(old + b'0.5,3,"torn')
    file = SampleFile(path)
    file.check()
    assert file.rows("a") == {0: sample(0, "text, old")}
    file.add([sample(0, temperature=0.5), sample(1, "new", temperature=0.5)], {})
    assert path.read_bytes() == old + written(("", 4, 1.0, 8, "new", 1, 1, "a"))


def test_columns_that_a_later_version_has_are_read(tmp_path):
    path = tmp_path / "x.csv"
    SampleFile(path).add([sample(0, later=3, k=None)], {})
    file = SampleFile(path)
    file.add([sample(1, k=2)], {})
    assert [dict(row.made) for row in file] == [{"later": "3"}, {"k": "2"}]
    assert path.read_bytes().splitlines()[0].decode() == ",".join([*COLUMNS, "later", "k"])


def made(algo="bamdlm", **changes):
    found = made_with(algo, SamplingParams(length=8, bos_id=0, eos_id=0, num_steps=3, **changes))
    return {name: value for name, value in found.items() if value is not None}


def test_numbers_that_are_read_are_told_and_no_others():
    told = {"k", "confidence", "threshold", "remask_eta", "T", "block_size", "window"}
    for rule, reads in (
        ("first_hitting", set()),
        ("ancestral", {"T"}),
        ("remask", {"T", "remask_eta"}),
        ("confidence", {"k", "confidence"}),
        ("threshold", {"threshold"}),
    ):
        assert made(steps=rule).keys() & told == {*reads, "block_size"}, rule
        assert made("mdlm", steps=rule).keys() & told == {*reads, "window"}, rule
    assert made("ar").keys() & told == set()
    assert made("sedd").keys() & told == {"T"}
    assert made("ar")["steps"] == "ar"
    assert made("sedd", nucleus_p=0.5)["nucleus_p"] == 0.5


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_rule_has_the_same_columns(algo):
    """A file has one header for all its runs."""
    params = [SamplingParams(length=8, bos_id=0, eos_id=0, steps=rule) for rule in STEPS]
    columns = {tuple(made_with(algo, each)) for each in params}
    assert columns == {tuple(made_with("bamdlm", params[0]))}


# ---- reports -------------------------------------------------------------------------------------


def test_the_report_keeps_every_run(tmp_path):
    file = SampleFile(tmp_path / "x.csv")
    file.report("a", {"run": "a", "rows": 2})
    SampleFile(tmp_path / "x.csv").report("b", {"run": "b", "rows": 3, "k": 1})
    file.report("a", {"run": "a", "rows": 5})
    assert file.reports() == {"a": {"run": "a", "rows": 5}, "b": {"run": "b", "rows": 3, "k": 1}}
    content = json.loads(file.summary.read_text())
    assert content.pop("runs") == file.reports()
    assert content == {"run": "a", "rows": 5}  # the last


def test_a_report_of_an_older_version_is_kept(tmp_path):
    file = SampleFile(tmp_path / "x.csv")
    file.summary.write_text(json.dumps({"run": "old", "gen_ppl": 20.5}))
    file.check()
    file.report("new", {"run": "new", "gen_ppl": 10.5})
    assert file.reports()["old"] == {"run": "old", "gen_ppl": 20.5}


@pytest.mark.parametrize(
    "content", ["[1]", "{}", "no JSON", '{"ppl": 3.5}', '{"run": "a", "runs": 3}']
)
def test_a_report_of_something_else_is_refused_and_stays(tmp_path, content):
    file = SampleFile(tmp_path / "x.csv")
    file.summary.write_text(content)
    with pytest.raises(ValueError, match=r"x\.csv: the report goes to .*x\.json"):
        file.check()
    with pytest.raises(ValueError, match=r"x\.json"):
        file.report("a", {"run": "a"})
    assert file.summary.read_text() == content


def _report(path, number):
    for turn in range(5):
        SampleFile(path).report(f"{number}-{turn}", {"run": f"{number}-{turn}"})


def test_processes_that_report_together_lose_no_run(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_report, args=(tmp_path / "x.csv", n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    expected = {f"{number}-{turn}" for number in range(4) for turn in range(5)}
    assert SampleFile(tmp_path / "x.csv").reports().keys() == expected
