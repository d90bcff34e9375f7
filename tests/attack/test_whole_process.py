"""The bounds of time and memory, measured on main.py itself: one hostile file of each kind."""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import test_packed_files as packed
import test_parquet_files as parquets
import test_pickle_files as pickles
import test_safetensors_files as heads
import test_text_files as texts
import test_tokenizer_files as tokenizers
from conftest import GOLDEN
from tools import HEAD, MEMORY, ROOT, SECONDS, clear

TRAIN = ["mode=train", "algo=ar", "model=tiny", "data.cache_dir=cache", "wandb=null"]
EVALUATE = ["mode=ppl_eval", "algo=bamdlm", "data=text8", "data.cache_dir=cache", "wandb=null"]


def text(name: str) -> list[str]:
    tokens = "data.tokenizer_name_or_path=characters"
    return [*TRAIN, "data=files", f"data.train={name}", "data.valid=b.txt", tokens]


def tokenizer(made, config=tokenizers.CONFIG) -> list[str]:
    os.mkdir("x")
    tokenizers.write(Path("x"), made, config)
    return [*text("b.txt")[:-1], "data.tokenizer_name_or_path=x"]


def weights(change) -> list[str]:
    shutil.copytree(GOLDEN / "hf_export", "x")
    head, numbers = heads.read(GOLDEN / "hf_export")
    heads.written(Path("x"), change(head), numbers)
    return [*EVALUATE, "eval.checkpoint_path=x"]


def checkpoint(data: bytes) -> list[str]:
    return [*EVALUATE, f"eval.checkpoint_path={pickles.archive(data)}"]


def archive(source: str) -> list[str]:
    return [*TRAIN, "data=wikitext2", f"data.source={source}"]


def many_added() -> dict:
    more = (tokenizers.END | {"id": i, "content": f"<{i}>"} for i in range(4, 1_000_000))
    return tokenizers.added(*more)


KINDS = {
    "a line of 200 MB": lambda: text(texts.line(200 << 20)),
    "JSON that is deep": lambda: text(texts.written("x.jsonl", "[" * 100_000)),
    "a row of 300 MB": lambda: text(texts.one_long_row()),
    "a page of 2 GB": lambda: text(parquets.changed(2, parquets.MOST)),
    "2^31 lengths": lambda: text(parquets.BOMBS["2^31 lengths"][0]()),
    "a device": lambda: text(texts.linked("/dev/zero", "x.txt")),
    "a hole of 8 GB": lambda: archive(packed.hole()),
    "300 MB in 300 kB": lambda: archive(packed.packed_tar(300 << 20)),
    "a zip that lies": lambda: archive(packed.zipped(size=0xFFFFFFF0)),
    "100 MB of a head": lambda: weights(heads.longer(100 << 20)),
    "1 500 000 tensors": lambda: weights(heads.many),
    "a doubled tuple": lambda: checkpoint(b"\x80\x02N" + b"q\x010h\x01h\x01\x86" * 60 + b"."),
    "a huge memo": lambda: checkpoint(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "a table of 8 GB": lambda: tokenizer(tokenizers.charsmap("/////w==")),
    "an expression without end": lambda: tokenizer(tokenizers.split("^(a+)+$")),
    "a million added tokens": lambda: tokenizer(many_added()),
}


def measured(words: list[str]) -> tuple[int, str, float, int]:
    """(exit code, output, seconds, most bytes of memory) of main.py. The kernel's count for a
    child begins with what the process that starts it has; this one is of the program alone."""
    began, most = time.perf_counter(), 0
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with open("log", "w+") as log:
        command = [sys.executable, str(ROOT / "main.py"), *words]
        started = subprocess.Popen(command, env=quiet, stdout=log, stderr=subprocess.STDOUT)
        while started.poll() is None and time.perf_counter() - began < SECONDS:
            with suppress(OSError):
                status = Path(f"/proc/{started.pid}/status").read_text()
                found = re.search(r"VmHWM:\s+(\d+) kB", status)
                most = max(most, 1024 * int(found[1]) if found else 0)
            time.sleep(0.02)
        started.kill()
        code = started.wait()
        log.seek(0)
        return code, log.read(), time.perf_counter() - began, most


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_refused_within_the_bounds(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("one two three\n" * 500)
    code, said, seconds, memory = measured(KINDS[kind]())
    print(f"{kind}: {seconds:.1f} s, {memory / 2**30:.2f} GiB")
    assert code == 2, said[-3000:]
    assert memory < MEMORY
    clear(said[said.index(HEAD) :])  # behind what it was doing
    assert "Traceback" not in said
