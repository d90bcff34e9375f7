"""SSD-LM's report: the project's own figures."""

import json

import pytest
import report_genppl
from conftest import GOLDEN
from ssd_lm_tools import JUDGE, command, generate, samples, texts


def test_the_report_is_the_projects_generative_perplexity(tmp_path):
    from evaluation.judge import load_judge
    from evaluation.quality import perplexity

    assert generate(tmp_path, "--num_samples_to_generate", 4, length=30)[0] == 0
    out = tmp_path / "report.json"
    status, shown, _ = command(
        report_genppl, tmp_path / "s.jsonl", "--judge", JUDGE, "--device", "cpu", "--out", out
    )
    assert status == 0
    (row,) = json.loads(out.read_text())["files"]
    scores = load_judge(str(JUDGE)).score(texts(tmp_path))
    assert row["samples"] == 4
    assert row["gen_ppl"] == pytest.approx(perplexity(scores).value, rel=1e-5)
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
    from evaluation.judge import describe

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


def test_a_figure_that_some_samples_lack_is_left_out(tmp_path):
    record = {"sampled_sequences": "a rose", "total_seq_time": 2.0}
    (tmp_path / "mixed.json").write_text(json.dumps([record | {"nfe": 3}, record]))
    status, shown, _ = command(report_genppl, tmp_path, "--judge", JUDGE, "--device", "cpu")
    assert status == 0
    assert shown.splitlines()[1].split()[5] == "-"


def test_a_report_reads_a_list_and_a_folder(tmp_path):
    plain = [{"sampled_sequences": "to be or not to be"}, {"sampled_sequences": "a rose"}]
    (tmp_path / "list.json").write_text(json.dumps(plain))
    (tmp_path / "one.json").write_text(json.dumps(plain[0]))
    status, shown, _ = command(report_genppl, tmp_path, "--judge", JUDGE, "--device", "cpu")
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["2", "1"]
