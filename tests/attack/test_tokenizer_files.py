"""Tokenizers and judges whose files were made to do harm, or went wrong."""

import copy
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import GOLDEN
from tools import cases, refused

from data import trial
from data.tokenizer import get_tokenizer
from evaluation.judge import load_judge

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"
END = {"id": 3, "content": "<e>", "special": True, "normalized": False}
END |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "u": 2, "<e>": 3}, "unk_token": "u"}
PARTS = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
TOKENIZER = {
    "version": "1.0",
    **dict.fromkeys(PARTS),
    "added_tokens": [END],
    "model": WORDS,
}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "bos_token": "<e>"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What the library imports late, once here and not in each trial."""
    folder = tmp_path_factory.mktemp("good")
    write(folder, TOKENIZER, CONFIG)
    assert get_tokenizer(str(folder)).encode("b") == [1]


def write(folder: Path, tokenizer, config) -> None:
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        value = value() if callable(value) else value
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(text)


def split(pattern: str) -> dict:
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return TOKENIZER | {"pre_tokenizer": regex | {"invert": False}}


def replace(pattern: dict, content: str, times=1) -> dict:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return TOKENIZER | {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


def words(**changes) -> dict:
    return TOKENIZER | {"model": WORDS | changes}


def charsmap(text: str) -> dict:
    return TOKENIZER | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def model(**parts) -> dict:
    return TOKENIZER | {"model": parts}


def added(*tokens: dict) -> dict:
    return TOKENIZER | {"added_tokens": [END, *tokens]}


NONE = "holds no tokenizer that transformers can load"
TOKENIZERS = {
    "an expression without end": (split("^(a+)+$"), CONFIG, "retry-limit"),
    "another without end": (split(r"(?:a|a|aa)+?c(?=b)"), CONFIG, "retry-limit"),
    "a normalizer without end": (replace({"Regex": "(a+)+$"}, "x"), CONFIG, "retry-limit"),
    "a broken expression": (split("("), CONFIG, NONE),
    "a table of 8 GB": (charsmap("/////w=="), CONFIG, "ended the process"),
    "a table of nothing": (charsmap("AAAA"), CONFIG, NONE),
    "an id of 4e9": (words(vocab=WORDS["vocab"] | {"c": 4_294_967_290}), CONFIG, "4,294,967,290"),
    "an id of 5e9": (words(vocab=WORDS["vocab"] | {"c": 5_000_000_000}), CONFIG, NONE),
    "an id below zero": (words(vocab=WORDS["vocab"] | {"c": -1}), CONFIG, NONE),
    "merges of nothing": (model(type="BPE", vocab={"a": 0}, merges=[["a", "q"]]), CONFIG, NONE),
    "an unknown id": (model(type="Unigram", vocab=[["a", 0.0]], unk_id=99), CONFIG, NONE),
    "scores that are no numbers": (
        json.dumps(model(type="Unigram", vocab=[["a", 0.5]], unk_id=0)).replace("0.5", "NaN"),
        CONFIG,
        NONE,
    ),
    "endless scores": (
        json.dumps(model(type="Unigram", vocab=[["a", 0.5]], unk_id=0)).replace("0.5", "1e999"),
        CONFIG,
        NONE,
    ),
    "two tokens of one id": (
        words(vocab=WORDS["vocab"] | {"c": 0}),
        CONFIG,
        "'a' and 'c' have the same id",
    ),
    "an added id of 2^40": (added(END | {"id": 1 << 40, "content": "x"}), CONFIG, NONE),
    "an added id below zero": (added(END | {"id": -1, "content": "x"}), CONFIG, NONE),
    "a merge of three": (model(type="BPE", vocab={"a": 0}, merges=[["a"] * 3]), CONFIG, NONE),
    "a merge of one": (model(type="BPE", vocab={"a": 0}, merges=["a"]), CONFIG, NONE),
    "a dropout of 5": (model(type="BPE", vocab={"a": 0}, merges=[], dropout=5), CONFIG, NONE),
    "a prefix of 100 MB": (
        lambda: TOKENIZER | {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000_000}},
        CONFIG,
        "ended the process",
    ),
    "a stride beyond the length": (
        TOKENIZER | {"truncation": {"direction": "Right", "max_length": 0, "stride": 5}},
        CONFIG,
        NONE,
    ),
    "decoders in each other": (
        '{"decoder":' + '{"type":"Sequence","decoders":[' * 2000 + "]}" * 2000 + "}",
        CONFIG,
        "nested too deeply",
    ),
    "code of its own": (
        TOKENIZER,
        CONFIG | {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"},
        NONE,
    ),
    "a million added tokens": (
        lambda: added(*(END | {"id": i, "content": f"<{i}>"} for i in range(4, 1_000_000))),
        CONFIG,
        NONE,
    ),
    "another model": (model(type="Magic"), CONFIG, NONE),
    "a list": ([1], CONFIG, NONE),
    "deep JSON": ('{"model":' * 100_000, CONFIG, NONE),
    "no JSON": ("{", CONFIG, NONE),
    "a config of a list": (TOKENIZER, [1, 2], NONE),
    "a config of text": (TOKENIZER, '"x"', NONE),
    "a deep config": (TOKENIZER, "[" * 100_000, NONE),
    "a config of 5 000 digits": (TOKENIZER, '{"model_max_length": %s}' % ("9" * 5000), NONE),
    "a class of a list": (TOKENIZER, CONFIG | {"tokenizer_class": ["A"]}, NONE),
    "an end of a dict": (TOKENIZER, CONFIG | {"eos_token": {"a": 1}}, NONE),
    "an end of a list": (TOKENIZER, CONFIG | {"eos_token": ["<e>"]}, NONE),
    "special tokens of a number": (TOKENIZER, CONFIG | {"additional_special_tokens": 5}, NONE),
    "added tokens of a list": (TOKENIZER, CONFIG | {"added_tokens_decoder": [1]}, NONE),
}


@pytest.mark.parametrize(
    ("tokenizer", "config", "message"), cases(TOKENIZERS, ["a million added tokens"])
)
def test_a_hostile_tokenizer_is_refused(tokenizer, config, message, capfd):
    os.mkdir("x")
    write(Path("x"), tokenizer, config)
    refused(lambda: get_tokenizer("x"), "data.tokenizer_name_or_path=x", message)
    assert capfd.readouterr().err == ""  # a panic prints a page


def test_a_tokenizer_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 2)
    os.mkdir("x")
    write(Path("x"), replace({"String": "a"}, "aa", 31), CONFIG)
    refused(lambda: get_tokenizer("x"), "data.tokenizer_name_or_path=x", "after 2 s")


def test_a_panic_in_the_middle_of_a_text_is_one_line(capfd):
    """An expression that the trial does not know."""
    os.mkdir("x")
    write(Path("x"), split("(z+)+$"), CONFIG)
    tokenizer = get_tokenizer("x")
    refused(lambda: tokenizer.encode("z" * 64 + "!"), "data.tokenizer_name_or_path", "retry-limit")


LINKS = {
    "endless": lambda: os.symlink("/dev/zero", "x/special_tokens_map.json"),
    "a FIFO": lambda: os.mkfifo("x/vocab.json"),
    "of nowhere": lambda: os.symlink("nowhere", "x/merges.txt"),
    "8 GB": lambda: os.truncate(os.open("x/vocab.json", os.O_CREAT | os.O_RDWR), 8 << 30),
}


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
def test_a_folder_with_a_file_that_is_none_is_refused(make):
    os.mkdir("x")
    write(Path("x"), TOKENIZER, CONFIG)
    make()
    refused(lambda: get_tokenizer("x"), "data.tokenizer_name_or_path=x", NONE)


# ---- judges --------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def changed(**changes):
    def change():
        config = json.loads(Path("x/config.json").read_text())
        Path("x/config.json").write_text(json.dumps(config | changes))

    return change


def pickled():
    os.remove("x/model.safetensors")
    Path("x/pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))


def cut():
    data = Path("x/model.safetensors").read_bytes()
    Path("x/model.safetensors").write_bytes(data[: len(data) // 2])


def packed(data: bytes):
    """A torch zip file around a pickle, in the place of the weights."""
    os.remove("x/model.safetensors")
    with zipfile.ZipFile("x/pytorch_model.bin", "w") as out:
        out.writestr("archive/data.pkl", data)


def bomb():
    packed(b"\x80\x02N" + b"q\x010h\x01h\x01\x86" * 60 + b".")


def memo():
    packed(b"\x80\x02Nr\xff\xff\xff\x7f.")


def larger_tokenizer():
    """Every id is one that the model does not have."""
    made = json.loads(Path("x/tokenizer.json").read_text())
    vocab = made["model"]["vocab"]
    made["model"]["vocab"] = {token: id + len(vocab) for token, id in vocab.items()}
    Path("x/tokenizer.json").write_text(json.dumps(made))


def without(name: str):
    return lambda: os.remove(f"x/{name}")


def rewritten(name: str, text: str):
    return lambda: Path(f"x/{name}").write_text(text)


def endless(name: str):
    def change():
        os.remove(f"x/{name}")
        os.symlink("/dev/zero", f"x/{name}")

    return change


JUDGES = {
    "a pickle": pickled,
    "half of its weights": cut,
    "no weights": without("model.safetensors"),
    "no config": without("config.json"),
    "an endless config": endless("config.json"),
    "endless weights": endless("model.safetensors"),
    "a config of a list": rewritten("config.json", "[1]"),
    "a deep config": rewritten("config.json", "[" * 100_000),
    "a config of 5 000 digits": rewritten("config.json", '{"model_type": %s}' % ("9" * 5000)),
    "another kind of model": changed(model_type="magic"),
    "a kind of a list": changed(model_type=["gpt2"]),
    "code of its own": changed(auto_map={"AutoModelForCausalLM": "x.Model"}, model_type="magic"),
    "a width of text": changed(hidden_size="wide", n_embd="wide"),
    "a width of 2^40": changed(hidden_size=1 << 40, n_embd=1 << 40),
    "a vocabulary of 2^40": changed(vocab_size=1 << 40),
    "a vocabulary of 10^9": changed(vocab_size=10**9),
    "10^9 layers": changed(n_layer=10**9),
    "10^9 layers of another name": changed(num_hidden_layers=10**9),
    "900 layers": changed(n_layer=900, n_embd=4096),
    "a width of 10^6": changed(n_embd=10**6),
    "a pickle of doubled tuples": bomb,
    "a pickle of a huge memo": memo,
    "a context of text": changed(max_position_embeddings="x", n_positions="x"),
    "a context below zero": changed(max_position_embeddings=-5, n_positions=-5),
    "escape sequences": changed(model_type=ESCAPE),
    "a broken tokenizer": rewritten("tokenizer.json", "{"),
    "no tokenizer": without("tokenizer.json"),
    "a tokenizer of many more": larger_tokenizer,
}


@pytest.mark.parametrize("make", JUDGES.values(), ids=JUDGES)
def test_a_hostile_judge_is_refused(make):
    shutil.copytree(GOLDEN / "judge", "x")
    make()
    refused(lambda: load_judge("x"), "eval.gen_ppl_eval_model_name_or_path='x'")
    assert not Path("ran").exists()


def test_there_are_many_of_them():
    assert len(copy.copy(TOKENIZERS)) + len(JUDGES) + len(LINKS) > 40
