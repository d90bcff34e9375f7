"""One kernel for a pass over a few new tokens: what cache.py does in several steps."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from networks import assert_within, small, texts

from models import cache as cache_module
from models.kernels import decode, starting
from models.layers import Rotary, rotate
from models.masks import BlockCausal

# rows' committed tokens, new tokens, block size, window: an empty ring, a full one, one gone round
PASSES = [
    ([0, 4, 12], 4, 4, 16),
    ([0, 4, 40], 8, 4, 16),
    ([3, 25], 1, 1, 16),
    ([299, 777], 2, 1, 300),
    ([2, 6], 4, 4, 12),
    ([0, 4, 9], 8, 4, 4),  # a window of one block, two blocks at once
    ([0, 16, 1024], 16, 16, 512),
    ([0, 496, 512], 32, 16, 512),
    ([48, 640], 64, 16, 512),
    ([20, 20, 20], 4, 4, 16),  # all at one place
]


def step_by_step(qkv, cos, sin, keys, values, committed, block_size, window):
    """The same by rotating, writing, masking and torch's attention, in float32."""
    slots, heads = keys.shape[1:3]
    mask = BlockCausal(block_size, window)
    places = cache_module._places(committed, qkv.shape[1], slots, slots, mask, dtype=torch.float32)
    _, slot, rows, visible = places
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(parts[:2], cos, sin).unbind()
    for store, new in ((keys, k), (values, parts[2])):
        store.index_put_((rows, slot), new.transpose(1, 2).to(store.dtype))
    q, k, v = q.float(), keys.transpose(1, 2).float(), values.transpose(1, 2).float()
    answer = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return answer.transpose(1, 2).flatten(2).to(qkv.dtype)


def inputs(committed, tokens, block_size, window, head_width, dtype, device, kept):
    """qkv, cos, sin, and a ring (of dtype `kept`) that is full of numbers nobody may see. Rows that
    stand at the same place share their cos and sin."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=kept):
        return torch.randn(shape, generator=generator).to(device, dtype)

    ring = len(committed), window + block_size, 3, head_width
    committed = torch.tensor(committed, device=device)
    places = committed[:1] if len(committed.unique()) == 1 else committed
    positions = places[:, None] + torch.arange(tokens, device=device)
    cos, sin = Rotary(head_width).to(device)(positions)
    qkv = random(len(committed), tokens, 3 * 3 * head_width, dtype=dtype)
    return qkv, cos, sin, random(*ring), random(*ring), committed


def compare(committed, tokens, block_size, window, head_width, dtype, device, tolerance, kept=None):
    with torch.inference_mode():
        case = committed, tokens, block_size, window, head_width, dtype, device
        asked = inputs(*case, kept or dtype)
        qkv, cos, sin, keys, values, counts = asked
        copies = keys.clone(), values.clone()
        found = decode.decode(qkv, cos, sin, keys, values, counts, block_size, window)
        wanted = step_by_step(qkv, cos, sin, *copies, counts, block_size, window)
    assert found.dtype == dtype
    assert_within(found.float(), wanted.float(), tolerance, "answer")
    assert_within(keys.float(), copies[0].float(), tolerance, "keys")  # rotated: one rounding
    assert torch.equal(values, copies[1])


KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_width", "dtype", "tolerance"),
    [(64, torch.float16, 2e-3), *((w, *kind) for w in decode.HEAD_WIDTHS for kind in KINDS)],
)
def test_the_kernel_is_the_steps(cuda, head_width, dtype, tolerance, monkeypatch):
    for few in (True, False):  # programs: their keys are shared out, or not
        monkeypatch.setattr(decode, "processors", lambda device, few=few: 1000 * few)
        for case in PASSES:
            compare(*case, head_width, dtype, cuda, tolerance)


@pytest.mark.gpu
def test_few_rows_and_many_are_taken_in_other_ways(cuda):
    many = decode.processors(cuda)  # of three heads each: more than two programs a processor
    for rows in (1, many):
        compare([24] * rows, 4, 4, 64, 32, torch.float32, cuda, 1e-5)


@pytest.mark.gpu
def test_the_kernel_runs_where_its_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    compare(*PASSES[0], 32, torch.float32, torch.device("cuda", 1), 1e-5)


BY_THE_INTERPRETER = """
import torch, test_decode as t
for few in (False, True):
    t.decode.processors = lambda device: 1000 * few
    for case in t.PASSES:
        t.compare(*case, 32, torch.float32, "cpu", 1e-5)
t.compare(*t.PASSES[0], 32, torch.float32, "cpu", 1e-5, kept=torch.float16)
"""


def test_the_kernel_is_the_steps_by_tritons_interpreter():
    """On a CPU: it makes numpy of the kernel. bfloat16 is for a GPU."""
    pytest.importorskip("triton", reason="pip install triton, to run the kernel on a CPU")
    paths = os.pathsep.join([".", "tests", *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", BY_THE_INTERPRETER], env=environment, check=True)


@pytest.fixture
def stand_in(monkeypatch):
    """The steps in the place of the kernel, on any device; yields how often they were asked."""
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape[1])
        return step_by_step(*arguments)

    monkeypatch.setattr(cache_module, "can_decode", lambda keys, tokens: tokens <= 8)
    monkeypatch.setattr(cache_module, "decode", counted)
    return calls


@pytest.mark.parametrize("known", [True, False], ids=["uniform", "ragged"])
@torch.no_grad()
def test_a_network_with_the_kernel_is_the_network(stand_in, known):
    net, tokens = small(), texts(2, 40, 7)
    cache = net.new_cache(2, 8, 4)
    attends, _ = cache.begin(4)
    assert {type(attend) for attend in attends} == {cache_module.Decode}  # no mask is made
    wanted, found = net.hidden(tokens, attention_mask=cache.attention_mask), []
    for start in range(0, 40, 4):
        given = cache if known else cache.at(cache.committed, cache.reach_of(start, 4))
        found.append(
            net.hidden(
                tokens[:, start : start + 4], attention_mask=cache.attention_mask, cache=given
            )
        )
        cache = cache.commit(4)
    assert_within(torch.cat(found, 1), wanted, 1e-5)
    assert stand_in == [4] * 10 * len(net.blocks)


@torch.no_grad()
def test_long_passes_go_step_by_step(stand_in):
    net, tokens = small(), texts(2, 16, 7)
    cache = net.new_cache(2, 16, 4)
    net.hidden(tokens[:, :12], attention_mask=cache.attention_mask, cache=cache)
    assert not stand_in
    hidden = net.hidden(tokens[:, 12:], attention_mask=cache.attention_mask, cache=cache.commit(12))
    assert_within(hidden, net.hidden(tokens, attention_mask=cache.attention_mask)[:, 12:], 1e-5)
    assert stand_in


def test_one_recording_serves_all_lengths(stand_in):
    cache = small().new_cache(1, 1024, 4)
    assert cache.reach_of(0, 4) == cache.reach_of(900, 4) == cache.slots
    assert cache.reach_of(0, 12) == cache_module.REACH_STEP


class OnGpu:
    """What is asked of a ring; no GPU is needed for that."""

    device, shape, dtype = torch.device("cuda"), (2, 8, 3, 64), torch.float32

    def __init__(self, **change):
        vars(self).update(change)


@pytest.mark.parametrize(
    ("keys", "tokens", "expected"),
    [
        (OnGpu(), 16, True),
        (OnGpu(), decode.MOST_TOKENS + 1, False),
        (OnGpu(shape=(2, 8, 3, 48)), 16, False),
        (OnGpu(shape=(2, 8, 3, 16)), 16, False),
        (OnGpu(dtype=torch.float64), 16, False),
        (torch.zeros(2, 8, 3, 64), 16, False),
    ],
    ids=["taken", "tokens", "width 48", "width 16", "float64", "cpu"],
)
def test_what_the_kernel_takes(keys, tokens, expected, monkeypatch):
    monkeypatch.setattr(starting, "triton", object())
    monkeypatch.setattr(starting, "_can_start", lambda device: True)
    assert not decode.can_decode(keys, tokens)  # it has no gradients
    with torch.no_grad():
        assert decode.can_decode(keys, tokens) == expected
        monkeypatch.setattr(starting, "triton", None)
        assert not decode.can_decode(keys, tokens)


@pytest.mark.parametrize(
    ("kilobytes", "compiler", "expected"),
    [(227, "gcc", True), (99, "clang", True), (64, "gcc", False), (227, None, False)],
    ids=["H100", "small", "Turing", "no compiler"],
)
def test_where_the_kernel_runs(kilobytes, compiler, expected, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(starting.shutil, "which", {compiler: "/usr/bin/it"}.get)
    assert starting._can_start.__wrapped__(torch.device("cuda")) == expected
    monkeypatch.setenv("CC", "cc")
    assert starting._can_start.__wrapped__(torch.device("cuda")) == (kilobytes >= 99)


def test_the_compiler_does_not_look_for_a_compiler(monkeypatch):
    """It could not follow, and where it runs for a GPU Triton runs too."""
    asked, here, there = [], torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(starting, "triton", object())
    monkeypatch.setattr(starting, "_can_start", asked.append)
    assert not starting.can_start(here)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert starting.can_start(there)
    assert asked == [here]
    assert not starting.can_start(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not starting.can_start(there)
