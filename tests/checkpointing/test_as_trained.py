"""Settings under which weights mean something else are compared at every load."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import ALGORITHMS, ends_with_2, in_a_copy, tiny

import main
import settings
from checkpointing.as_trained import MAY_DIFFER, check_as_trained, streams_version
from checkpointing.layouts import read_checkpoint
from checkpointing.restricted_pickle import CheckpointError
from data.tokenizer import get_tokenizer
from sampling.notebook import load
from scripts import export_hf
from settings.keys import LEAVES

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_launch_folder")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The words of a finished run, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    words = [*tiny(folder), *ALGORITHMS["bamdlm"], f"checkpointing.save_dir={folder / 'run'}"]
    assert main.main(words) == 0
    return words, folder / "run/checkpoints/last.ckpt"


@pytest.fixture
def changed(run, tmp_path):
    """The words of the run, and its checkpoint after change(hyper_parameters)."""

    def make(change):
        words, path = run
        raw = torch.load(path, weights_only=True)
        change(raw["hyper_parameters"])
        other = tmp_path / "run/checkpoints/last.ckpt"
        other.parent.mkdir(parents=True)
        torch.save(raw, other)
        return [*words, f"checkpointing.save_dir={tmp_path / 'run'}"], other

    return make


LOADS = {
    "resume": lambda path: ["trainer.max_steps=12"],
    "finetune": lambda path: [
        f"training.from_pretrained={path}",
        "checkpointing.save_dir=other",
        "seed=2",
    ],
    "ppl_eval": lambda path: ["mode=ppl_eval", f"eval.checkpoint_path={path}"],
    "sample_eval": lambda path: ["mode=sample_eval", f"eval.checkpoint_path={path}"],
}


def test_a_setting_that_shapes_cannot_show_is_refused(changed, capsys):
    words, path = changed(lambda h: h["config"]["algo"].update(parameterization="sedd"))
    for load_words in LOADS.values():
        found = ends_with_2([*words, *load_words(path)], capsys)
        assert "algo.parameterization=s" in found
        assert "sedd" in found
        assert "subs" in found


def test_another_tokenizer_is_refused(changed, capsys):
    words, path = changed(lambda h: h["tokenizer"].update(fingerprint="0", name_or_path="other"))
    for load_words in LOADS.values():
        found = ends_with_2([*words, *load_words(path)], capsys)
        assert "was trained with the tokenizer other" in found
        assert "data.tokenizer_name_or_path" in found
    with pytest.raises(CheckpointError, match="trained with the tokenizer other"):
        load(path, tokenizer="text8")
    assert export_hf.main([str(path), "out", "--tokenizer", "text8"]) == 2
    assert "trained with the tokenizer other" in capsys.readouterr().err


def test_a_tokenizer_of_the_same_name_has_the_same_ids(changed):
    """The fingerprint changes with the version of the library."""
    _, path = changed(lambda h: h["tokenizer"].update(fingerprint="0"))
    load(path)
    other = get_tokenizer("characters:ACGT")
    with pytest.raises(CheckpointError, match="ids, mask"):
        check_as_trained(read_checkpoint(path), None, other, "text8")


def test_documents_apart_are_evaluated_apart(changed, capsys):
    words, path = changed(lambda h: h["config"]["data"].update(pack="whole"))
    evaluate = [*words, "mode=ppl_eval", f"eval.checkpoint_path={path}"]
    found = ends_with_2(evaluate, capsys)
    assert "was trained with data.pack=whole, here it is wrap" in found
    assert "give data.pack=whole" in found
    assert main.main([*evaluate, "data.pack=documents"]) == 0


def test_a_row_of_one_document_looks_like_documents_apart(changed):
    words, path = changed(lambda h: h["config"]["data"].update(pack="documents"))
    evaluate = [*words, "mode=ppl_eval", f"eval.checkpoint_path={path}"]
    assert main.main([*evaluate, "data.wrap=False"]) == 0


def test_documents_apart_look_like_rows_of_one_document(changed):
    words, path = changed(lambda h: h["config"]["data"].update(wrap=False))
    evaluate = [*words, "mode=ppl_eval", f"eval.checkpoint_path={path}"]
    assert main.main([*evaluate, "data.pack=documents"]) == 0


def test_one_block_without_cross_attention_becomes_blocks(changed):
    """With one block it says nothing; more blocks cannot be without it."""
    words, path = changed(lambda h: h["config"]["algo"].update(cross_attn=False))
    assert main.main([*words, *LOADS["ppl_eval"](path)]) == 0
    assert main.main([*words, *LOADS["finetune"](path)]) == 0


@pytest.mark.parametrize("version", ["2", None, 0, -1, 1.5, True, [1], 3])
def test_an_unknown_version_of_the_random_streams_is_refused(run, version):
    found = dataclasses.replace(
        read_checkpoint(run[1]), raw={"sampler": {"examples_seen": 1, "streams": version}}
    )
    words = re.escape(
        f"began with version {version!r} of the random streams; this code has 1 and 2"
    )
    with pytest.raises(CheckpointError, match=words):
        streams_version(found)


@pytest.mark.parametrize(
    "about", [{"fingerprint": "0"}, {"fingerprint": [1], "name_or_path": {}, "vocab_size": "35"}]
)
def test_a_tokenizer_that_is_described_badly_is_refused(changed, about, capsys):
    words, path = changed(lambda h: h.update(tokenizer=about))
    assert "was trained with the tokenizer" in ends_with_2([*words, *LOADS["resume"](path)], capsys)


def test_what_the_file_does_not_say_had_the_default(changed):
    words, path = changed(lambda h: h["config"]["algo"].pop("parameterization"))
    check_as_trained(read_checkpoint(path), settings.load(words), get_tokenizer("text8"), "text8")


def test_what_may_differ_are_settings():
    assert LEAVES.keys() > MAY_DIFFER


# ---- an extender's flag

SCRIPT = """
import json
import settings
from checkpointing.as_trained import check_as_trained
from checkpointing.layouts import Checkpoint
from data.tokenizer import get_tokenizer

def outcome(trained, words):
    model = {} if trained is None else {"post_norm": trained}
    config = {"algo": {"name": "mdlm"}, "model": model}
    weights = Checkpoint(
        "x.ckpt", "lightning", ("mdlm",), config, {}, raw={"sampler": {"examples_seen": 1}}
    )
    here = words and settings.load(["algo=mdlm", *words])
    try:
        check_as_trained(weights, here, get_tokenizer("text8"), "text8")
    except ValueError as error:
        return str(error)
    return here and settings.differences(here, config)

on, off = ["model.post_norm=true"], ["model.post_norm=false"]
print(json.dumps({
    "on as on": outcome(True, on),
    "off as on": outcome(False, on),
    "on as off": outcome(True, off),
    "absent as on": outcome(None, on),
    "absent as off": outcome(None, off),
    "on in a notebook": outcome(True, None),
    "off in a notebook": outcome(False, None),
}))
"""


def test_a_new_flag_of_the_network_is_compared_without_further_work(tmp_path):
    """One line in a copy of the schema, nothing else."""
    copy = tmp_path / "copy"
    for name in ("configs", "settings", "checkpointing", "data", "models", "objectives"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("samplers", "training", "evaluation", "modes"):
        shutil.copytree(ROOT / name, copy / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    schema = copy / "settings/sections/network.py"
    line = '    compile: bool = doc("compile the layers'
    flag = '    post_norm: bool = doc("normalise after attention", default=False)\n'
    assert schema.read_text().count(line) == 1
    schema.write_text(schema.read_text().replace(line, flag + line))
    code, text = in_a_copy(copy, SCRIPT)
    assert code == 0, text
    found = json.loads(text)
    for same in ("on as on", "absent as off"):
        assert found[same] == []
    assert found["off in a notebook"] is None
    assert "trained with model.post_norm=False, here it is True" in found["off as on"]
    assert "trained with model.post_norm=False, here it is True" in found["absent as on"]
    assert "trained with model.post_norm=True, here it is False" in found["on as off"]
    assert "give model.post_norm=True" in found["on as off"]
    assert "trained with model.post_norm=True, here it is False" in found["on in a notebook"]
