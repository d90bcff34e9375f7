"""data=chat in whole runs: killed and going on, on two processes, evaluated; what is refused."""

import json
import signal
from pathlib import Path

import pytest
import torch
from chats import some, talk, tokenizer, write
from runs import ALGORITHMS, LAST, at_call, ends_with_2, finish, ranks, read, run, tell, tiny

from data import streaming
from diffusion import Diffusion
from scripts import show_batch
from training.log_reading import read_log

pytestmark = pytest.mark.filterwarnings("ignore")
STREAMED = ["data.streaming=true", "loader.num_workers=1"]


@pytest.fixture
def words(tmp_path):
    """Overrides of a run on 30 conversations, in rows of 128 characters."""
    tokenizer().save(tmp_path / "tokenizer")
    train = write(tmp_path / "train.jsonl", *some(30))
    valid = write(tmp_path / "valid.jsonl", *some(7))
    given = [word for word in tiny(tmp_path) if not word.startswith(("data=", "data.train"))]
    return [
        "data=chat",
        *(word for word in given if not word.startswith(("data.valid", "data.tokenizer"))),
        f"data.train={train}",
        f"data.valid={valid}",
        f"data.tokenizer_name_or_path={tmp_path / 'tokenizer'}",
        "model.length=128",
        "model.dropout=0",
        "optim.eps=1e-4",
    ]


def in_folder(words, folder):
    return [*words, f"checkpointing.save_dir={folder}"]


def test_killed_it_goes_on_to_the_same_bits(words, tmp_path, monkeypatch):
    """Streamed, so that conversations are rendered below a process that loads data."""
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 1000)
    words = [*words, *ALGORITHMS["bamdlm"], *STREAMED, "model.dropout=0.2"]
    words += ["trainer.max_steps=7", "trainer.limit_val_batches=0"]
    words += ["callbacks.checkpoint_monitor=null"]
    whole = in_folder(words, tmp_path / "whole")
    code, text = run(whole, tmp_path / "log")
    assert code == 0, text
    stopped = in_folder(words, tmp_path / "stopped")
    before = at_call(Diffusion, "training_step", 13, tell(signal.SIGKILL))
    code, text = run(stopped, tmp_path / "log", before=before)
    assert code == -signal.SIGKILL, text
    code, text = run(stopped, tmp_path / "log")
    assert code == 0, text
    assert "going on from step 4" in text
    ours, theirs = (read(tmp_path / n / "checkpoints/last.ckpt") for n in ("stopped", "whole"))
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name


def test_two_processes_train_as_one(words, tmp_path):
    """A step is divided by the answers' tokens of all processes."""
    words = [*words, *ALGORITHMS["bamdlm"], "trainer.limit_val_batches=0", "trainer.max_steps=4"]
    code, text = run(in_folder([*words, "loader.batch_size=8"], tmp_path / "one"), tmp_path / "log")
    assert code == 0, text
    both = in_folder([*words, "loader.batch_size=2", "trainer.devices=2"], tmp_path / "two")
    started = ranks(2, both, tmp_path / "two.txt")
    assert finish(started) == [0, 0], started[0].text()
    ours, theirs = (read_log(tmp_path / n / "metrics.csv") for n in ("two", "one"))
    assert ours["trainer/loss"] == pytest.approx(theirs["trainer/loss"], rel=1e-5)


@pytest.mark.parametrize("algo", ["bamdlm", "mdlm", "ar"])
def test_evaluation_scores_the_answers(algo, words, tmp_path):
    """As many tokens as the answers and their ends have, whatever the block size."""
    words = [*words, *ALGORITHMS[algo], "trainer.max_steps=1", "algo.clip_search_widths=[]"]
    words = in_folder(words, tmp_path / "run")
    more = ["trainer.limit_val_batches=0", "callbacks.checkpoint_monitor=null"]
    code, text = run([*words, *more], tmp_path / "log")
    assert code == 0, text
    code, text = run([*words, "mode=ppl_eval"], tmp_path / "log")
    assert code == 0, text
    (path,) = (tmp_path / "run").glob("ppl_*.json")
    answers = [
        message["content"]
        for record in some(7)
        for message in record["messages"]
        if message["role"] == "assistant"
    ]
    assert json.loads(path.read_text())["tokens"] == sum(len(each) + 1 for each in answers)


def test_show_batch_marks_what_is_learnt(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", {"messages": talk("hi", "you", "why", "so")})
    assert show_batch.main([*words, "block_size=4", "--rows", "1"]) == 0
    said = capsys.readouterr().out.replace("│", "")
    assert "assistant↵⟦you<|im_end|>⟧↵<|im_start|>user↵why<|im_end|>" in said
    assert "assistant↵⟦so<|im_end|><|endoftext|>⟧▒" in said
    assert "% of them learnt," in said


REFUSED = {
    "data.pack=wrap": "data.pack=wrap does not go with data.format=chat",
    "data.pack=documents": "use data.pack=whole",
    "data.wrap=false": "data.wrap=False does not go with data.format=chat",
    "data.insert_train_eos=true": "whose template sets all special tokens; use data.insert_train_e",
    "data.text_column=x": "data.text_column=x does not go with data.format=chat",
    "data.train=shakespeare": "data.train=shakespeare is a corpus of plain text",
    "training.resample=true": "training.resample=True does not go with data.format=chat",
    "data.format=talk": "data.format=talk must be one of text, chat",
    "data.chat_fields={who: from}": "data.chat_fields={'who': 'from'} must be names in your files",
    "data.chat_fields={role: 3}": "such as {messages: conversations, user: human}",
}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.usefixtures("_launch_folder")
def test_settings_that_do_not_go_with_conversations_are_named(word, words, capsys):
    said = ends_with_2([*words, word], capsys)
    assert REFUSED[word] in said
    assert Path(LAST).name not in said


@pytest.mark.usefixtures("_launch_folder")
def test_a_bad_line_stops_a_run_with_one_sentence(words, tmp_path, capsys):
    write(tmp_path / "train.jsonl", *some(3), {"messages": talk("hi")})
    said = ends_with_2(in_folder(words, tmp_path / "run"), capsys)
    assert "train.jsonl: line 4 has no turn of the assistant, so nothing to learn" in said
    assert "Traceback" not in said
