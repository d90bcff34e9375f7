"""Random bytes of checkpoints, texts and tokenizers: each file is read, or refused with a reason.

The same examples every time; many more of them with scripts/test.sh --slow.
"""

import io
import json
import pickle
import struct
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import GOLDEN
from tools import bounded

pytest.importorskip("hypothesis")
from examples import alike
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpointing import torch_file
from checkpointing.families import shape_of
from checkpointing.layouts import CheckpointError, read_checkpoint
from checkpointing.load import build_backbone_args, build_network
from data.corpora import get_corpus, opened
from data.tokenizer import get_tokenizer
from models.llama import Llama

FEW, MANY = 60, 2000
SMALL = sorted((GOLDEN / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_size)[0]
RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"}
watched: list[str] = []


def _audit(event: str, arguments) -> None:
    if watched and event in RUNS:
        watched.append(event)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """Some bytes of `data` replaced, left out or put in, or all behind a place cut off."""
    places, pieces = st.integers(0, len(data)), st.binary(max_size=12)
    edits = st.lists(st.tuples(places, st.integers(0, 12), pieces), min_size=1, max_size=6)

    def edited(changes, end):
        found = data
        for place, length, piece in changes:
            found = found[:place] + piece + found[place + length :]
        return found[: end or None]

    return st.builds(edited, edits, st.just(0) | places)


def reads(read, *refusals: type) -> None:
    """Whether it ends within bounds, at most with an error that a command line answers."""
    with bounded(), suppress(*refusals):
        read()


# ---- checkpoints ---------------------------------------------------------------------------------


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
    return file.getvalue()


def small() -> bytes:
    """A pickle with all that checkpoints have."""
    file = io.BytesIO()
    shared = torch.arange(4.0)
    torch.save({"state_dict": {"backbone.x": shared}, "global_step": 3, "ema": [shared]}, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


CODES = [getattr(pickle, name) for name in pickle.__all__ if name.isupper()]
CODES = [code for code in CODES if isinstance(code, bytes)]
names = st.sampled_from(
    ["os\nsystem", "builtins\neval", "torch\nFloatStorage", "collections\nOrderedDict", "a\nb"]
)
fragments = st.one_of(
    st.sampled_from(CODES),
    st.builds(lambda n: b"c" + n.encode() + b"\n", names),
    st.builds(lambda t: b"X" + struct.pack("<I", len(t.encode())) + t.encode(), st.text("ab\x1b")),
    st.builds(lambda n: b"K" + bytes([n]), st.integers(0, 255)),
    st.builds(lambda n: b"r" + struct.pack("<I", n), st.integers(0, 2**32 - 1)),
    st.sampled_from([b"N", b"}", b"]", b")", b"(", b"s", b"a", b"t", b"R", b"b", b"\x85", b"Q"]),
    st.binary(max_size=5),
)
programs = st.lists(fragments, max_size=60).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


def check_pickle(data: bytes) -> None:
    watched[:] = ["watching"]
    try:
        reads(lambda: torch_file.load(io.BytesIO(zipped(data)), "x"), CheckpointError)
        assert watched == ["watching"]
    finally:
        watched.clear()


def check_checkpoint(data: bytes) -> None:
    Path("x.ckpt").write_bytes(data)
    reads(lambda: build_backbone_args(read_checkpoint("x.ckpt")), CheckpointError)


@pytest.fixture(scope="module", autouse=True)
def _audited():
    sys.addaudithook(_audit)


@alike(4 * FEW)
@given(programs | changed(small()))
def test_random_pickles(data):
    check_pickle(data)


@alike(FEW // 2)
@given(changed(SMALL.read_bytes()))
def test_random_checkpoints(data):
    check_checkpoint(data)


@pytest.mark.slow
@alike(10 * MANY)
@given(programs | changed(small()))
def test_more_random_pickles(data):
    check_pickle(data)


@pytest.mark.slow
@alike(MANY)
@given(changed(SMALL.read_bytes()))
def test_more_random_checkpoints(data):
    check_checkpoint(data)


# ---- folders -------------------------------------------------------------------------------------

CONFIG = (GOLDEN / "hf_export" / "config.json").read_bytes()
WEIGHTS = (GOLDEN / "hf_export" / "model.safetensors").read_bytes()
HEAD = 8 + struct.unpack("<Q", WEIGHTS[:8])[0]  # bytes of the header


def check_folder(config: bytes, header: bytes) -> None:
    Path("x").mkdir(exist_ok=True)
    Path("x/config.json").write_bytes(config)
    Path("x/model.safetensors").write_bytes(header + WEIGHTS[HEAD:])
    reads(lambda: build_backbone_args(read_checkpoint("x")), CheckpointError)


folders = st.tuples(changed(CONFIG), st.just(WEIGHTS[:HEAD])) | st.tuples(
    st.just(CONFIG), changed(WEIGHTS[:HEAD])
)


@alike(FEW)
@given(folders)
def test_random_hub_folders(parts):
    check_folder(*parts)


@pytest.mark.slow
@alike(MANY)
@given(folders)
def test_more_random_hub_folders(parts):
    check_folder(*parts)


# ---- texts ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MODEL = {
    **{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 4},
    **{"vocab_size": 5, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
}
OTHER_KEYS = ("rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window")
OTHER_KEYS += ("layer_types", "hidden_act", "attention_bias", "mask_token_id", "block_size")
ropes = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"]),
    st.sampled_from(["llama3", "linear", "yarn"]) | json_values,
)
model_configs = st.dictionaries(st.sampled_from([*MODEL, *OTHER_KEYS]), ropes | json_values)


def check_model(changes: dict) -> None:
    """A model of transformers."""
    config = {**MODEL, **changes}
    if not Path("m").exists():
        Path("m").mkdir()
        save_file(Llama(**vars(shape_of("m", MODEL))).state_dict(), "m/model.safetensors")
    Path("m/config.json").write_text(json.dumps(config))
    reads(lambda: build_network(read_checkpoint("m")), CheckpointError)


@alike(FEW // 3)
@given(model_configs)
def test_random_models_of_transformers(changes):
    check_model(changes)


@pytest.mark.slow
@alike(MANY)
@given(model_configs)
def test_more_random_models_of_transformers(changes):
    check_model(changes)


objects = st.builds(
    lambda text, more: json.dumps({**more, "text": text}).encode(),
    json_values,
    st.dictionaries(st.text(max_size=3), json_values, max_size=3),
)
lines = st.lists(objects | st.binary(max_size=40), max_size=6).map(b"\n".join)


def parquet() -> bytes:
    file = io.BytesIO()
    rows = pyarrow.table({"text": ["one", "two words", ""] * 5, "n": list(range(15))})
    pyarrow.parquet.write_table(rows, file)
    return file.getvalue()


def check_text(kind: str, data: bytes) -> None:
    name = f"x.{kind}"
    Path(name).write_bytes(data)

    def read():
        _, pieces = opened(get_corpus(name, "train"), "train", None, "text", Path("cache"))
        assert all(isinstance(piece.text, str) for piece in pieces)

    reads(read, ValueError)


texts = st.one_of(
    st.tuples(st.just("jsonl"), lines | st.binary()),
    st.tuples(st.just("txt"), st.binary() | st.text().map(str.encode)),
    st.tuples(st.just("parquet"), changed(parquet())),
)


@alike(4 * FEW)
@given(texts)
def test_random_texts(text):
    check_text(*text)


@pytest.mark.slow
@alike(5 * MANY)
@given(texts)
def test_more_random_texts(text):
    check_text(*text)


# ---- tokenizers ----------------------------------------------------------------------------------

FOLDER = GOLDEN / "judge"
TOKENIZER = (FOLDER / "tokenizer.json").read_bytes()
SETTINGS = (FOLDER / "tokenizer_config.json").read_bytes()
tokenizers = st.tuples(changed(TOKENIZER), st.just(SETTINGS)) | st.tuples(
    st.just(TOKENIZER), changed(SETTINGS)
)


def check_tokenizer(tokenizer: bytes, config: bytes) -> None:
    Path("x").mkdir(exist_ok=True)
    Path("x/tokenizer.json").write_bytes(tokenizer)
    Path("x/tokenizer_config.json").write_bytes(config)
    reads(lambda: get_tokenizer("x").encode("The sea, 12 km off."), ValueError)


@alike(FEW // 3)
@given(tokenizers)
def test_random_tokenizers(parts):
    check_tokenizer(*parts)


@pytest.mark.slow
@alike(MANY // 10)
@given(tokenizers)
def test_more_random_tokenizers(parts):
    check_tokenizer(*parts)
