"""Random settings and prompts: each is taken, or refused in clear lines; nothing else happens.

The same examples every time; many more of them with scripts/test.sh --slow.
"""

import json
from pathlib import Path

import pytest
from tools import bounded, clear

pytest.importorskip("hypothesis")
from examples import alike
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import get_tokenizer
from modes import cli
from sampling.prompts import encode_prompts, read_prompts
from settings import ConfigError
from settings.keys import LEAVES, SCHEMA, groups
from utils import reason

BASE = [
    *("data=files", "data.train=text.txt", "data.valid=text.txt", "model=tiny", "wandb=null"),
    "data.tokenizer_name_or_path=characters",
]
MODES = [[], ["mode=sample_eval", "eval.checkpoint_path=org/model"], ["mode=plan"]]
KEYS = [*SCHEMA, *groups()]
FEW, MANY = 15, 600
MARKS = "[]{}()<>,:;=~'\"\\$.-+@#&|!?*%/_ 09aeEnN\t\n"

texts = st.text(max_size=40) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Nd"]))
marks = st.text(st.sampled_from(MARKS), max_size=30)
numbers = st.integers(-(10**40), 10**40) | st.floats() | st.integers(-3, 3)
references = st.lists(st.sampled_from(KEYS), max_size=4).map(
    lambda keys: "".join(f"${{{key}}}" for key in keys)
)
nested = st.recursive(
    numbers | st.text("ab", max_size=3) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value).replace('"', ""))
long = st.tuples(st.sampled_from("n9/[({$="), st.integers(200, 6000)).map(lambda x: x[0] * x[1])
values = st.one_of(texts, marks, numbers.map(str), references, nested, long)
words = st.builds("{}{}={}".format, st.sampled_from(["", "+", "++"]), st.sampled_from(KEYS), values)
odd_words = st.one_of(words, st.builds("~{}".format, st.sampled_from(KEYS)), texts, marks)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A cat sat on a mat.\n" * 50)


def settles(arguments: list[str], capsys) -> None:
    """Whether a command line is composed, or refused as it should be; nothing is written."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    code = 0
    with bounded():
        try:
            cli.configure(arguments)
        except SystemExit as stopped:
            code = stopped.code
    message = capsys.readouterr()
    if code:
        assert code == 2
        clear(message.err, None)
    assert sorted(Path.cwd().rglob("*")) == before


def fuzz_command_lines(most, capsys):
    @alike(most)
    @given(st.sampled_from(MODES), st.lists(odd_words, min_size=1, max_size=3))
    def one(mode, drawn):
        settles([*BASE, *mode, *drawn], capsys)

    one()


def fuzz_values(most, capsys):
    @alike(most)
    @given(st.sampled_from(MODES), st.sampled_from(list(LEAVES)), values)
    def one(mode, key, value):
        settles([*BASE, *mode, f"{key}={value}"], capsys)

    one()


def fuzz_prompts(most):
    tokenizer = get_tokenizer("characters:abc []MASK")
    prompts = st.text("abc [MASK]\n", max_size=40) | st.lists(
        st.sampled_from(["[MASK]", " ", "a", "[MA"]), max_size=8
    ).map("".join)
    lines = st.one_of(
        st.binary(max_size=60),
        texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.builds(lambda text: json.dumps({"prompt": text}).encode(), texts | prompts),
        st.builds(lambda depth: b'{"prompt":' + b"[" * depth, st.integers(0, 20_000)),
        prompts.map(str.encode),
    )

    @alike(most)
    @given(
        st.lists(lines, max_size=4).map(b"\n".join),
        st.sampled_from([".txt", ".jsonl"]),
        st.booleans(),
    )
    def one(content, suffix, infill):
        path = Path(f"prompts{suffix}")
        path.write_bytes(content)
        with bounded():
            try:
                ids = encode_prompts(
                    read_prompts(path), tokenizer, infill=infill, length=32, context_size=32
                )
                assert all(0 <= each < tokenizer.vocab_size for row in ids for each in row)
            except (ValueError, OSError) as error:
                clear(str(ConfigError([reason(error)])))

    one()


def test_command_lines(capsys):
    fuzz_command_lines(FEW, capsys)


def test_values_of_every_kind(capsys):
    fuzz_values(FEW, capsys)


def test_prompts():
    fuzz_prompts(5 * FEW)


@pytest.mark.slow
def test_many_command_lines(capsys):
    fuzz_command_lines(MANY, capsys)


@pytest.mark.slow
def test_values_of_every_kind_at_length(capsys):
    fuzz_values(MANY, capsys)


@pytest.mark.slow
def test_many_prompts():
    fuzz_prompts(10 * MANY)
