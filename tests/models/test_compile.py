"""model.compile: the blocks as one graph, the same numbers, and a clear word where it cannot work.

The graphs are made with the backend aot_eager, which traces forward and backward pass as inductor
does and leaves out the minutes of the C++ compiler.
"""

import faulthandler
import functools
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from networks import GRADIENTS, assert_within, small, texts
from torch.nn.attention.flex_attention import flex_attention

import settings
from models import cache, denoiser, network
from models.attention import (
    LARGE_TILES,
    SMALL_TILES,
    _block_mask,
    _has_little_shared_memory,
    _kernel_options,
    dense,
)
from models.compiling import GRAPHS, compiled, keep_signal
from models.masks import BlockCausal, BlockDiffusion, Causal, Full
from objectives import head
from samplers import canvas, draw, nucleus
from samplers.params import SamplingParams, Warp


class Graphs(list):
    """Those that `backend` was given."""


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a code generator, and how many graphs it made."""
    torch._dynamo.reset()
    graphs = Graphs()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    graphs.backend = backend

    plain = torch.compile
    monkeypatch.setattr(network.torch, "compile", functools.partial(plain, backend=backend))
    yield graphs
    torch._dynamo.reset()


def both(mask, traced, **kwargs):
    """Hidden states and a gradient, plain and compiled."""
    results = []
    for by_compiler in (False, True):
        net = small(compile=by_compiler, n_blocks=3)
        hidden = net.hidden(texts(2, 24, 7), attention_mask=mask, **kwargs)
        hidden.square().sum().backward()
        results.append((hidden.detach(), net.blocks[0].attn_qkv.weight.grad))
    return results


@pytest.mark.parametrize("mask", [Full(), Causal(), BlockDiffusion(4)], ids=repr)
def test_compiled_blocks_give_equal_results(mask, traced):
    (plain, plain_gradient), (ours, gradient) = both(mask, traced, read=torch.arange(5))
    assert traced
    assert_within(ours, plain, 1e-5)
    assert (gradient - plain_gradient).norm() <= GRADIENTS * plain_gradient.norm()


def test_one_graph_serves_all_blocks(traced):
    both(Full(), traced)
    assert len(traced) == 1


def test_ddp_leaves_blocks_whole(traced, tmp_path):
    """Its buckets are smaller than a block here."""
    group = torch.distributed.FileStore(str(tmp_path / "group"), 1)
    torch.distributed.init_process_group("gloo", store=group, rank=0, world_size=1)
    try:
        net = small(compile=True, n_blocks=3, hidden_size=512).train()
        net.forward = functools.partial(net.hidden, attention_mask=Full())
        shared = torch.nn.parallel.DistributedDataParallel(
            net, bucket_cap_mb=1, find_unused_parameters=True
        )
        shared(texts(2, 8, 7)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(traced) == 1


def test_another_number_of_rows_read_compiles_nothing(traced):
    net, tokens = small(compile=True, n_blocks=3), texts(2, 24, 7)
    for rows in (5, 6, 9):
        net.hidden(tokens, attention_mask=BlockDiffusion(4), read=torch.arange(rows))
    assert len(traced) == 2  # the last block has its own


@pytest.mark.parametrize("documents", [False, True], ids=["one text", "packed"])
def test_other_block_sizes_of_the_rows_compile_nothing(documents, traced):
    """Each step deals its rows other sizes."""
    net, tokens = small(compile=True, n_blocks=3), texts(3, 48, 7)
    ids = torch.arange(48)[None].expand(3, -1) % 24 // 12 if documents else None
    graphs = []
    for sizes in ([1, 4, 12], [12, 1, 1], [4, 4, 4]):
        asked = {"read": torch.arange(5), "document_ids": ids}
        mask, sizes = BlockDiffusion(12), torch.tensor(sizes)
        net.hidden(tokens, attention_mask=mask, block_sizes=sizes, **asked).sum().backward()
        graphs.append(len(traced))
    assert graphs == [2, 2, 2]  # the last block has its own


@torch.no_grad()
def test_flex_attention_compiles_once_for_all_block_sizes(traced):
    run = torch.compile(flex_attention, backend=traced.backend, fullgraph=True)
    q, k, v = torch.randn(3, 3, 2, 256, 8)
    for sizes in ([1, 4, 64], [64, 16, 4], [1, 1, 1]):
        mask = BlockDiffusion(64, sizes=torch.tensor(sizes))
        made = _block_mask(mask, 256, 256, None, q.device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = run(q, k, v, block_mask=made)
        assert_within(ours, dense(mask, 256, 256, None, q.device)(q, k, v), 1e-5)
    assert len(traced) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_the_compiled_loss_kernel_is_the_plain_one(gradient, monkeypatch):
    by_tracing = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(head.torch, "compile", by_tracing)
    compiled.cache_clear()
    for rows in (6, 5):
        logits = torch.randn(rows, 40)[:, :37] * 5  # a part of padded rows
        target = torch.randint(36, (rows,))
        ours = logits.clone()
        expected = head.cross_entropy(logits, target, gradient, mask_id=36)
        found = head.fused_cross_entropy(ours, target, gradient, mask_id=36)
        assert_within(found, expected, 1e-6)
        if gradient:
            assert_within(ours, logits, 1e-6)
    compiled.cache_clear()


def test_passes_with_a_cache_are_not_compiled(traced):
    net = small(compile=True)
    cache = net.new_cache(2, 8, 4)
    with torch.no_grad():
        net.hidden(texts(2, 4, 7), attention_mask=BlockCausal(4, 8), cache=cache)
    assert not traced


def test_compiled_draws_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(
        draw.torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )
    compiled = draw.compiled_sample.__wrapped__()
    warp = Warp(temperature=0.7, top_k=1000, nucleus_p=0.9)
    for rows in (1, 4, 3, nucleus.SEARCHED_ROWS):
        log_p = (torch.randn(rows, 1, 5000) * 3).log_softmax(-1)
        key = torch.randint(1 << 60, (rows, 1))
        with torch.inference_mode():
            token = compiled(log_p, key, warp, "float32")
            assert torch.equal(token, draw.sample(log_p, key, warp, "float32"))


@pytest.mark.parametrize("compiled", [True, False])
def test_only_compiled_draws_may_have_more_graphs_than_torch_allows(compiled, monkeypatch):
    monkeypatch.setattr(canvas, "compiled", functools.partial(torch.compile, backend="eager"))
    before, found = torch._dynamo.config.recompile_limit, []

    def sample(log_probs, *others):
        found.append(torch._dynamo.config.recompile_limit)
        return log_probs.argmax(-1)

    denoise = SimpleNamespace(mask_id=2, recordable=False, compiled=False)
    page = canvas.Canvas(denoise, SamplingParams(3, bos_id=0, eos_id=1), 0, "cpu", None)
    page.x, page.compiled, page.sample = torch.zeros(1, 4, dtype=torch.int64), compiled, sample
    page.denoise = lambda *asked: torch.rand(1, 1, 2)
    page._reveal(page.x, None, torch.zeros(3, 1, 1, dtype=torch.int64))
    assert found == [GRAPHS if compiled else before]
    assert torch._dynamo.config.recompile_limit == before


def test_what_stands_around_the_blocks_is_the_same_compiled(traced):
    net, tokens = small(), texts(3, 4, 7)
    mask = BlockCausal(4, 16)
    with torch.inference_mode():
        places = compiled.__wrapped__(cache._places)
        for committed in ([0, 4, 12], [8, 20, 36]):
            for reach in (12, 20):
                given = (torch.tensor(committed), 4, 20, reach, mask, torch.float32)
                for ours, plain in zip(places(*given), cache._places(*given), strict=True):
                    assert torch.equal(ours, plain)
        begin = (net.vocab_embed, net.rotary_emb, tokens, torch.arange(4)[None] + 8)
        ours, *angles = compiled.__wrapped__(network._begin)(*begin)
        plain, *wanted = network._begin(*begin)
        assert torch.equal(ours, plain)
        assert_within(torch.stack(angles), torch.stack(wanted), 1e-6)
        hidden = net.hidden(tokens, attention_mask=Full()).flatten(0, 1)
        ours = compiled.__wrapped__(denoiser._log_probs)(net, hidden, 3)
        plain = denoiser._log_probs(net, hidden, 3)
    assert torch.equal(ours[:, 3], plain[:, 3])
    assert (plain[:, 3] == -torch.inf).all()
    assert_within(ours.exp(), plain.exp(), 1e-6)
    assert len(traced) >= 3


def test_a_compiled_network_has_the_same_parameter_names():
    assert list(small(compile=True).state_dict()) == list(small().state_dict())


def test_compile_is_off_by_default():
    assert not settings.load(["data=shakespeare"]).model.compile


def test_compile_is_refused_where_it_cannot_work(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    made = settings.load(["data=shakespeare", "model.compile=true"])
    problems, _ = settings.check(made)
    assert any("model.compile=True needs a C++ compiler" in problem for problem in problems)


@pytest.mark.parametrize(
    ("kilobytes", "width", "dtype", "tiles"),
    [
        (99, 64, torch.bfloat16, SMALL_TILES),
        (227, 64, torch.bfloat16, LARGE_TILES),
        (227, 64, torch.float32, None),
        (163, 128, torch.bfloat16, None),
    ],
)
def test_tiles_fit_the_gpu(kilobytes, width, dtype, tiles, monkeypatch):
    class Properties:
        shared_memory_per_block_optin = kilobytes << 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    _has_little_shared_memory.cache_clear()
    small = _has_little_shared_memory(torch.device("meta"))
    _has_little_shared_memory.cache_clear()
    assert _kernel_options(small, width, dtype) == tiles


def test_a_handler_that_python_does_not_know_stays(tmp_path):
    """A notebook may have asked for the stack by SIGUSR1."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with (tmp_path / "stacks").open("w") as file:
            faulthandler.register(signal.SIGUSR1, file)
            keep_signal()
            os.kill(os.getpid(), signal.SIGUSR1)
            faulthandler.unregister(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "test_a_handler_that_python_does_not_know_stays" in (tmp_path / "stacks").read_text()


def test_a_signal_is_heard_after_triton_has_compiled(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="pip install triton, to compile a kernel")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def kernel(x):
        pass

    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        triton.compile(ASTSource(kernel, {"x": "*fp32"}), target=GPUTarget("cuda", 90, 32))
        keep_signal()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
