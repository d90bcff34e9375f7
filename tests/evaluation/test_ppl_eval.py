"""mode=ppl_eval with every likelihood: tables, draws, what is refused, going on after a stop."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from runs import ALGORITHMS, tiny

import main
import settings
from checkpointing.layouts import Checkpoint
from evaluation.journal import Journal
from evaluation.table import LIKELIHOODS, NO_LIKELIHOOD, parse_likelihood
from modes import train
from noise_schedule import SCHEDULES, LogLinear
from objectives.block_diffusion import MaskedDiffusion
from training import progress
from training.validation import even_in_p

RULES = "left_to_right,greedy,margin,threshold:0.5,entropy_bounded:1"
EVERY = f"nelbo,counts,exact,first_hitting,iw:2,{RULES}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """{algo: words} that evaluate a checkpoint of it; each is trained at its first use."""
    made = {}
    sets = ALGORITHMS | {"blocks_of_one": ["algo=bamdlm", "block_size=1"]}

    def make(algo):
        if algo not in made:
            folder = tmp_path_factory.mktemp(algo)
            words = [w for w in (*base, *sets[algo]) if "clip_search" not in w]
            assert main.main([*words, f"checkpointing.save_dir={folder}"]) == 0
            last = f"eval.checkpoint_path={folder}/checkpoints/last.ckpt"
            made[algo] = [*words, "mode=ppl_eval", last]
        return made[algo]

    return make


pytestmark = pytest.mark.usefixtures("_launch_folder")


@pytest.fixture
def evaluate(trained, tmp_path):
    """(algo, more words) -> {likelihood: its entry}."""

    def run(algo, *more, place="run"):
        folder = tmp_path / place
        words = [*trained(algo), f"checkpointing.save_dir={folder}", *more]
        assert main.main(words) == 0
        (path,) = sorted(folder.glob("ppl_*.json"), key=lambda p: p.stat().st_mtime_ns)[-1:]
        found = json.loads(path.read_text())
        return {each["likelihood"]: each for each in found.get("likelihoods", [found])}

    return run


def test_a_list_gives_a_table_from_one_run(evaluate, capsys):
    found = evaluate("bamdlm", f"eval.likelihood=[{EVERY}]", "eval.draws=3")
    assert list(found) == EVERY.split(",")
    said = capsys.readouterr().out
    assert "eval.likelihood=exact: 15 passes over 11 rows of 16 tokens" in said
    assert "eval.likelihood=iw:2: 24 passes" in said  # of three draws
    assert {each["tokens"] for each in found.values()} == {11 * 15}  # position 0 is never scored
    assert found["first_hitting"]["nll"] < found["exact"]["nll"]
    assert found["exact"]["draw_error"] == found["greedy"]["draw_error"] == 0
    assert 0 < found["counts"]["draw_error"] < found["nelbo"]["draw_error"]
    assert found["exact"]["bound"] == "upper bound (NELBO)"
    assert found["greedy"]["bound"] == "exact for steps=confidence by probability"


def test_the_progress_moves_with_every_pass(evaluate, trained, monkeypatch, capsys):
    """Two batches of four rows and one of three, of 1 + 15 passes each."""
    trained("bamdlm")  # its validations have lines of their own
    capsys.readouterr()
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    evaluate("bamdlm", "eval.likelihood=[counts,exact]", "loader.eval_batch_size=4")
    said = [line for line in capsys.readouterr().out.splitlines() if "validation batch" in line]
    done = [float(line.split()[2]) for line in said]
    parts = [round(batch + part / 16, 2) for batch in range(3) for part in range(1, 17)]
    assert sorted(set(done)) == pytest.approx(sorted(parts), abs=0.006)
    assert "ppl" not in said[0], "nothing is measured yet"
    assert "rows" in said[1]


def test_one_row_has_no_error_that_json_could_not_hold(evaluate, capsys):
    found = evaluate("bamdlm", "trainer.limit_val_batches=1", "loader.eval_batch_size=1")
    assert "eval.likelihood=counts: 1 pass over 1 rows" in capsys.readouterr().out
    assert found["counts"]["rows"] == 1
    assert found["counts"]["ppl_error"] is found["counts"]["nll_error"] is None


@pytest.mark.parametrize("limit", ["1", "2", "0.5", "1.0", "99"])
def test_the_rows_that_are_said_are_those_that_are_read(evaluate, capsys, limit):
    found = evaluate("ar", f"trainer.limit_val_batches={limit}", "loader.eval_batch_size=4")
    said = capsys.readouterr().out
    assert f"1 pass over {found['exact']['rows']} rows of 16 tokens" in said
    assert " (exact): perplexity" in said


def test_exact_is_the_mean_of_many_draws(evaluate):
    asked = "[exact,counts,nelbo,first_hitting,iw:2]"
    found = evaluate("bamdlm", f"eval.likelihood={asked}", "eval.draws=60")
    noise = 3 * found["iw:2"]["draw_error"]
    law, exact = found["first_hitting"]["nll"], found["exact"]["nll"]
    assert law - noise < found["iw:2"]["nll"] < exact + noise
    for name in ("counts", "nelbo"):
        gap = found[name]["nll"] - found["exact"]["nll"]
        assert abs(gap) < 3 * found[name]["draw_error"]
    assert found["counts"]["draw_error"] < found["nelbo"]["draw_error"] / 2


def test_a_table_has_the_numbers_of_single_runs(evaluate):
    """One pass over both halves, or the clean half once for all."""
    table = evaluate("bamdlm", "eval.likelihood=[nelbo,counts]")
    for name in ("nelbo", "counts"):
        single = evaluate("bamdlm", f"eval.likelihood={name}", place=name)[name]
        assert single["nll"] == pytest.approx(table[name]["nll"], rel=1e-6)
        assert single["nll_error"] == pytest.approx(table[name]["nll_error"], rel=1e-5)
        assert single["draw_error"] is None  # one draw does not tell


def test_nothing_depends_on_the_batch(evaluate):
    words = f"eval.likelihood=[{EVERY}]", "eval.draws=2"
    alone = evaluate("bamdlm", *words, "loader.eval_batch_size=1", place="one")
    together = evaluate("bamdlm", *words, "loader.eval_batch_size=64", place="many")
    for name, entry in alone.items():
        assert entry["nll"] == pytest.approx(together[name]["nll"], rel=1e-6), name
        assert entry["nll_error"] == pytest.approx(together[name]["nll_error"], rel=1e-5), name


@pytest.mark.parametrize("algo", ["ar", "blocks_of_one"])
def test_with_blocks_of_one_there_is_one_likelihood(evaluate, algo):
    found = evaluate(algo, f"eval.likelihood=[{EVERY}]")
    for entry in found.values():
        assert entry["nll"] == found["exact"]["nll"]
        assert entry["bound"] == "exact"
        assert entry["draw_error"] == 0
    assert evaluate(algo, place="default")["exact"]["nll"] == found["exact"]["nll"]


def test_the_estimators_give_the_chain_rule_for_blocks_of_one(evaluate):
    """Without training.eval_nll they are asked: each is the likelihood but nelbo, whose draw at a
    time that masks nothing says nothing."""
    whole = evaluate("blocks_of_one", place="whole")["exact"]["nll"]
    found = evaluate("blocks_of_one", f"eval.likelihood=[{EVERY}]", "training.eval_nll=false")
    for name, entry in found.items():
        tolerance = 4 * entry["nll_error"] if name == "nelbo" else 1e-6 * whole
        assert entry["nll"] == pytest.approx(whole, abs=tolerance), name
    for name in ("counts", "exact"):  # alone it takes one pass, and is no draw of nelbo
        words = f"eval.likelihood={name}", "training.eval_nll=false"
        alone = evaluate("blocks_of_one", *words, place=f"{name}_alone")[name]
        assert alone["nll"] == pytest.approx(whole, rel=1e-6), name


def test_mdlm_has_all_but_those_of_every_set(evaluate, trained, capsys):
    words = "[counts,iw:1,left_to_right:4,greedy:8,margin,threshold:0.5]"
    found = evaluate("mdlm", f"eval.likelihood={words}", "eval.draws=2")
    assert {each["rows"] for each in found.values()} == {11}
    assert all(2 < each["nll"] < 5 for each in found.values())
    for name in ("exact", "first_hitting"):
        assert main.main([*trained("mdlm"), f"eval.likelihood={name}"]) == 2
        said = capsys.readouterr().err
        assert f"eval.likelihood={name} takes 65,535 passes over every text, more than" in said
        assert "eval.max_passes=1,024" in said


def test_sedd_has_its_own_bound_only(evaluate, trained, capsys):
    assert list(evaluate("sedd")) == ["nelbo"]
    for name in ("counts", "exact", "greedy"):
        assert main.main([*trained("sedd"), f"eval.likelihood={name}"]) == 2
        said = capsys.readouterr().err
        assert f"eval.likelihood={name}: algo=sedd tells its network the noise level" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.likelihood=iw"], "eval.likelihood=iw needs a number, orders drawn: iw:NUMBER"),
        (["eval.likelihood=exact:3"], "eval.likelihood=exact:3: exact takes no number"),
        (["eval.likelihood=greedy:0"], "must be a whole number, at least 1, got '0'"),
        (["eval.likelihood=threshold:1.5"], "must be in (0, 1], got '1.5'"),
        (["eval.likelihood=threshold:nan"], "must be in (0, 1], got 'nan'"),
        (
            ["eval.likelihood=iw:100", "eval.draws=3"],
            "takes 1,200 passes over every text, more than eval.max_passes=1,024",
        ),
        (
            ["mode=train", "eval.likelihood=greedy"],
            "training validates by one likelihood that takes one pass, nelbo or counts",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(trained, capsys, words, message):
    assert main.main([*trained("bamdlm"), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_name_is_answered_at_once(trained, capsys):
    with pytest.raises(SystemExit):
        main.main([*trained("bamdlm"), "eval.likelihood=[nelbo,exct]"])
    said = capsys.readouterr().err
    assert "eval.likelihood=['nelbo', 'exct'] must be made of nelbo, counts, exact" in said
    assert NO_LIKELIHOOD in said


def test_a_rule_that_looks_at_the_drawn_token_has_no_likelihood():
    with pytest.raises(ValueError, match=f"low_confidence must be one of .*; {NO_LIKELIHOOD}"):
        parse_likelihood("low_confidence")


@pytest.mark.parametrize("wrong", ["entropy_bounded", "entropy_bounded:-1", "entropy_bounded:nan"])
def test_the_bound_of_a_likelihood_is_a_number_of_at_least_0(wrong):
    with pytest.raises(ValueError, match=f"eval.likelihood={wrong}.* a bound in nats"):
        parse_likelihood(wrong)


def test_a_stopped_evaluation_goes_on_where_it_was(evaluate, monkeypatch, capsys):
    """Two batches of four rows are done; then the batches have other sizes."""
    words = "eval.likelihood=[exact,counts]", "eval.draws=2"
    whole = evaluate("bamdlm", *words, place="whole")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove", lambda self: None)
        evaluate("bamdlm", *words, "trainer.limit_val_batches=2")
    capsys.readouterr()
    found = evaluate("bamdlm", *words, "loader.eval_batch_size=3")
    assert "eval.likelihood=exact: 8 rows were measured before" in capsys.readouterr().out
    for name, entry in found.items():
        assert entry["rows"] == 11
        assert entry["nll"] == pytest.approx(whole[name]["nll"], rel=1e-6)
    evaluate("bamdlm", *words)
    assert "measured before" not in capsys.readouterr().out  # a finished one leaves nothing


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    class Into:
        seconds, rows = 0.0, {}

        def add(self, rows, tokens, nll):
            self.rows |= dict(zip(rows, nll, strict=True))

    journal = Journal(tmp_path, {"seed": 1})
    journal.write([1, 2], [5, 5], [[1.5], [2.5]], 0.1)
    with journal.path.open("a") as file:
        file.write('\n{"rows": [3], "tok')
    journal.write([4], [5], [[math.pi]], 0.1)
    into = Into()
    journal.read(into)
    assert into.rows == {1: [1.5], 2: [2.5], 4: [math.pi]}
    other = Into()
    other.rows = {}
    Journal(tmp_path, {"seed": 2}).read(other)
    assert other.rows == {}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_by_times_reports_a_uniform_network_rightly(name):
    """square_root leaves 3.1 % out between 0 and 1e-3: then times are drawn evenly in p."""
    objective = even_in_p(MaskedDiffusion(9, 4, SCHEDULES[name]), 1e-3)
    t = torch.linspace(1e-3, 1, 200_001, dtype=torch.float64)[1:]
    level = objective.noise_level(t, (1e-3, 1.0))
    # of a uniform network each masked token costs the same: the mean of weight * p is its share
    share = float((level.weight * level.p).mean())
    assert share == pytest.approx(1, abs=2e-3)
    assert share > 1 - 2e-5  # no less than the likelihood
    assert isinstance(objective.schedule, LogLinear) == (
        name in ("loglinear", "square_root", "log")
    )


def test_passes_are_those_of_the_table():
    passes = {name: parse_likelihood(name).passes(4) for name in EVERY.split(",")}
    assert passes == dict.fromkeys(["nelbo", "counts"], 1) | dict.fromkeys(
        ["exact", "first_hitting"], 15
    ) | {"iw:2": 8} | dict.fromkeys(RULES.split(","), 4)
    assert parse_likelihood("greedy:4").passes(1024) == 256
    assert {parse_likelihood(name).name for name in EVERY.split(",")} == set(LIKELIHOODS)


def test_validation_by_another_measure_is_said(trained, tmp_path, capsys):
    """A run that was begun by the code of before there was a choice validated by nelbo."""
    words = [w for w in trained("bamdlm") if not w.startswith(("mode=", "eval."))]
    words += [f"checkpointing.save_dir={tmp_path / 'run'}", "trainer.max_steps=4"]
    assert main.main([*words, "eval.likelihood=nelbo"]) == 0
    capsys.readouterr()
    assert main.main([*words, "trainer.max_steps=6"]) == 0
    said = capsys.readouterr().out
    assert "val/nll was measured by nelbo and is now by counts" in said
    assert "(eval.likelihood=nelbo stays with it)" in said


def test_validation_at_another_block_size_is_said(capsys):
    """Where training draws several; else it is refused."""
    run = {"block_size": 4, "eval": {"likelihood": ["counts"]}}
    raw = {"sampler": {"examples_seen": 8, "streams": 2}}
    resume = Checkpoint("last.ckpt", "lightning", ("bamdlm",), run, {}, step=1, raw=raw)
    config = settings.load(["training.block_sizes={4: 1, 16: 1}", "block_size=16"])
    train.go_on(config, SimpleNamespace(start_at=lambda *place: None), resume)
    said = capsys.readouterr().out
    assert "val/nll was measured at block_size=4 and is now at 16: the score of best.ckpt" in said


# ---- several block sizes

SIZES = "eval.block_sizes={1: .25, 2: .25, 4: .5}"


@pytest.fixture
def mixed(evaluate, tmp_path, capsys):
    """(words) -> what the JSON file holds, what was said, and the file."""

    def run(*more, place="run"):
        evaluate("bamdlm", *more, place=place)
        folder = tmp_path / place
        (path,) = sorted(folder.glob("ppl_*.json"), key=lambda p: p.stat().st_mtime_ns)[-1:]
        return json.loads(path.read_text()), capsys.readouterr().out, path

    return run


def nats_of_rows(folder):
    """{row: nats} of a journal that was kept."""
    (path,) = folder.glob("*.rows/*.jsonl")
    batches = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {r: n[0] for each in batches for r, n in zip(each["rows"], each["nll"], strict=True)}


def test_a_run_reports_each_size_and_the_mixture_text_by_text(mixed, monkeypatch, tmp_path):
    """Rows of a plain evaluation at each size, put together by hand."""
    found, said, path = mixed(SIZES)
    assert path.name.endswith("-mixture-1x0.25-2x0.25-4x0.5-exact.json")
    assert "block_size=2: the network was trained at 4\n" in said
    assert "eval.likelihood=exact at block_size=4: 15 passes over 11 rows" in said
    entry, *sizes = found["likelihoods"]
    assert found["nll"] == entry["nll"]
    assert found["block_sizes"] == {"1": 0.25, "2": 0.25, "4": 0.5}
    assert entry["likelihood"] == "mixture of 1, 2 and 4"
    assert (entry["bound"], entry["draw_error"], entry["low_ppl"]) == ("upper bound", 0, None)
    assert [each["bound"] for each in sizes] == ["exact", *["upper bound (NELBO)"] * 2]
    assert sum(each["share"] for each in sizes) == pytest.approx(1)
    monkeypatch.setattr(Journal, "remove", lambda self: None)
    rows = []
    for size, each in zip((1, 2, 4), sizes, strict=True):
        words = f"block_size={size}", "eval.likelihood=exact", "training.eval_nll=false"
        plain, _, _ = mixed(*words, place=str(size))
        assert each["nll"] == pytest.approx(plain["nll"], rel=1e-6)
        assert (each["block_size"], each["tokens"]) == (size, plain["tokens"])
        rows.append(nats_of_rows(tmp_path / str(size)))
    total = 0.0
    for row in rows[0]:
        logs = [math.log(w) - each[row] for w, each in zip((0.25, 0.25, 0.5), rows, strict=True)]
        total -= math.log(sum(math.exp(x - max(logs)) for x in logs)) + max(logs)
    assert entry["nll"] * entry["tokens"] == pytest.approx(total, rel=1e-6)
    assert entry["rows"] == 11
    assert 0 < entry["ppl_error"] < entry["ppl"]


def test_sizes_that_are_too_large_for_exact_are_drawn_and_both_sides_are_told(mixed):
    words = "eval.block_sizes={1: 1, 4: 2, 16: 2}", "eval.draws=3"
    found, said, path = mixed(*words)
    assert path.name.endswith("-1x0.2-4x0.4-16x0.4-exact-counts.json")
    entry, *sizes = found["likelihoods"]
    assert [each["likelihood"] for each in sizes] == ["exact", "exact", "counts"]
    assert [each["draws"] for each in (entry, *sizes)] == [3, 1, 1, 3]
    assert entry["low_nll"] < entry["nll"]
    assert entry["draw_error"] is None
    assert f"gives perplexity {entry['low_ppl']:.3f}, which is too low in expectation" in said
    together, _, _ = mixed(*words, "loader.eval_batch_size=3", place="other")
    assert together["nll"] == pytest.approx(found["nll"], rel=1e-6)


def test_one_draw_of_an_estimate_is_refused_in_a_mixture(trained, capsys):
    words = [*trained("bamdlm"), "eval.block_sizes={1: 1, 16: 1}"]
    assert main.main(words) == 2
    said = capsys.readouterr().err
    assert "eval.draws=1: at block_size=16 eval.likelihood=counts is estimated" in said
    assert "set eval.draws=2 or more" in said
    assert main.main([*words, "eval.likelihood=exact"]) == 2
    assert "eval.likelihood=exact takes 65,535 passes" in capsys.readouterr().err


def test_a_stopped_mixture_goes_on_where_it_was(mixed, monkeypatch):
    words = SIZES, "eval.likelihood=[counts]", "eval.draws=2"
    whole, _, _ = mixed(*words, place="whole")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove", lambda self: None)
        mixed(*words, "trainer.limit_val_batches=2")
    found, said, path = mixed(*words, "loader.eval_batch_size=3")
    for size in (1, 2, 4):
        assert f"eval.likelihood=counts at block_size={size}: 8 rows were measured before" in said
    assert found["nll"] == pytest.approx(whole["nll"], rel=1e-6)
    assert found["rows"] == 11
    assert not path.with_suffix(".rows").exists()
