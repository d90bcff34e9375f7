"""The diffs of docs/extending.md, applied to a copy of the tree and run there."""

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from runs import in_a_copy, tiny

from training.log_reading import read_log

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"
DIFFS = re.findall(r"^## (.*?)\n(?:.*?)```diff\n(.*?)```", PAGE.read_text(), re.M | re.S)
KINDS = {title.removeprefix("A ").removeprefix("An ") for title, _ in DIFFS}
TESTS = re.findall(r"^\+\+\+ b/(tests/\S+)", PAGE.read_text(), re.M)
# The golden and other tests of a kind, which must not fail for an entry without a recording.
OF_THE_KINDS = [
    "tests/test_noise.py",
    "tests/objectives/test_algorithms.py",
    "tests/samplers/test_sampling.py::test_a_plan_has_no_gap_and_leaves_nothing_masked",
    "tests/samplers/test_sampling.py::test_a_perfect_denoiser_returns_its_text",
]
NAMED_TEXT = textwrap.dedent(
    re.search(r"(^    defaults: .*?\n)\n", PAGE.read_text(), re.M | re.S)[1]
)
# In the copy: the help, runs of main.py and pytest, all in one interpreter.
DRIVER = """
import json, sys
import pytest
import main
from settings.help import full_help
runs, tests, result = json.loads(sys.argv[1])
done = {"help": full_help(), "codes": [main.main(words) for words in runs]}
done["tests"] = int(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
open(result, "w").write(json.dumps(done))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """(what the driver found, the folder of its runs, what it printed)"""
    folder = tmp_path_factory.mktemp("extending")
    copy = folder / "copy"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(needed, listed.stdout.splitlines()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "tests/golden").symlink_to(ROOT / "tests/golden")
    for _, diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    stories = folder / "stories"
    stories.mkdir()
    for split in ("train", "validation"):
        (stories / f"{split}.txt").write_text("once upon a time there was a dog " * 20)
    asked = json.dumps([runs(folder, stories), [*TESTS, *OF_THE_KINDS], str(folder / "result")])
    code, text = in_a_copy(copy, DRIVER, [asked])
    assert code == 0, text
    return json.loads((folder / "result").read_text()), folder, text


def needed(name: str) -> bool:
    beside = name.startswith(("tests/golden/", "docs/", "benchmarks/", "ssd-lm/"))
    return (ROOT / name).is_file() and not beside


def runs(folder: Path, stories: Path) -> list[list[str]]:
    """One run of each new thing."""
    base = [*tiny(folder), "trainer.max_steps=2"]
    words = [*base, "algo=mdlm"]
    trained = folder / "trained"
    checkpoint = trained / "checkpoints/last.ckpt"
    sample = ["mode=sample_eval", "algo.T=0", "sampling.num_sample_batches=1"]
    sample += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.batch_size=1"]
    surest = ["sampling.steps=surest", "sampling.share=0.3", f"sampling.logdir={folder / 'texts'}"]
    even = ["sampling.steps=even_first", f"sampling.logdir={folder / 'even'}"]
    # the new objective: trained, resumed, measured and asked for a text, in a folder of its own
    own = [*base, "algo=unweighted", f"checkpointing.save_dir={folder / 'unweighted'}"]
    others = [word for word in words if not word.startswith(("data.train", "data.valid"))]
    corpus = ["data=tinystories", f"data.source={stories}", "data.tokenizer_name_or_path=text8"]
    (folder / "own/data").mkdir(parents=True)
    named = NAMED_TEXT.replace("/path", str(stories)).replace("valid.txt", "validation.txt")
    (folder / "own/data/named.yaml").write_text(named)
    own_text = ["--config-dir", str(folder / "own"), "data=named", *corpus[2:]]
    return [
        [*words, "noise=sine", f"checkpointing.save_dir={trained}"],
        [*words, *sample, *surest, f"eval.checkpoint_path={checkpoint}"],
        [*words, *sample, *even, f"eval.checkpoint_path={checkpoint}"],
        [*own, "model.attn_backend=plain"],
        [*own, "model.attn_backend=plain", "trainer.max_steps=3"],
        [*own, "mode=ppl_eval"],
        [*own, *sample, f"sampling.logdir={folder / 'unweighted.csv'}"],
        [*others, *corpus, "mode=prepare"],
        [*others, *own_text, "mode=prepare"],
        [*words, "mode=count"],
    ]


def test_the_page_shows_every_kind():
    kinds = {"noise schedule", "step rule", "objective", "corpus", "logged metric", "mode"}
    assert kinds | {"planned step rule", "attention backend"} <= KINDS


def test_each_thing_takes_two_files_and_a_test():
    for title, diff in DIFFS:
        files = re.findall(r"^\+\+\+ b/(\S+)", diff, re.M)
        assert sum(name.startswith("tests/") for name in files) == 1, title
        assert len(files) <= 3, title


def test_every_new_setting_is_in_the_help(extended):
    text = " ".join(extended[0]["help"].split())
    for part in (
        " sine",
        " surest",
        " even_first",
        " sampling.share=0.5",
        " unweighted",
        " tinystories",
        " plain",
        "mode=count",
    ):
        assert part in text, part


def test_every_new_thing_runs(extended):
    found, folder, printed = extended
    assert found["codes"] == [0] * len(found["codes"]), printed
    assert (folder / "texts").is_file()
    assert (folder / "even").is_file()
    assert (folder / "unweighted.csv").is_file()
    assert len(read_log(folder / "unweighted/metrics.csv")["trainer/loss"]) == 3
    assert re.search(r"^unweighted on .*valid.txt \(counts, ", printed, re.M)
    assert len(read_log(folder / "trained/metrics.csv")["trainer/grad_norm"]) == 2
    assert re.search(r"^train: tinystories, 1 documents", printed, re.M)
    assert re.search(rf"^train: {folder}/stories/train.txt, 1 documents", printed, re.M)
    assert re.search(r"^[\d,]+ parameters$", printed, re.M)


def test_the_tests_of_the_diffs_pass_and_those_of_their_kinds(extended):
    found, _, printed = extended
    assert found["tests"] == 0, printed
