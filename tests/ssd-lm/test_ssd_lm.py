"""SSD-LM's decoding against the recordings, against enumeration, and batch against one by one."""

import pytest
import ssd_decode
import torch
from conftest import GOLDEN, load, load_json
from ssd_decode import RowNoise, alpha_bar, decode, draw_from_nucleus, nucleus
from ssd_model import SSDLM, load_model, load_tokenizer

FOLDER = GOLDEN / "ssd_lm"
DECODES = load_json("ssd_lm/decode.json")


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER / "model")


@pytest.fixture(scope="module")
def recorded():
    return load("ssd_lm/decode.safetensors")


class Replay:
    """The reference's order of draws from torch's global generator, remembered."""

    def __init__(self, size, log):
        self.size, self.log = size, log

    def gaussian(self, out=None):
        self.log.append(torch.normal(0, 1, size=self.size))
        return self.log[-1].clone()

    def choose(self, logits, top_p):
        filtered = logits.masked_fill(~nucleus(logits, top_p, stable=False), -1e10)
        self.log.append(torch.distributions.Categorical(logits=filtered).sample().view(-1, 1))
        return self.log[-1].view(logits.shape[:2])


def replay(model, recorded, name):
    about = DECODES[name]
    asked, log = about["kwargs"], []
    length, size = asked["max_seq_length"], asked["decoding_block_size"]
    context = recorded.get(f"decode.{name}.context", torch.empty(1, 0, dtype=torch.int64))
    torch.manual_seed(about["seed"])
    decoded = decode(
        model,
        context,
        lambda block: Replay((1, size, model.vocab_size), log),
        blocks=length // size,  # the reference drops what is left over
        total_t=asked["total_t"],
        top_p=asked["projection_top_p"],
        one_hot_value=asked["one_hot_value"],
    )
    return decoded, log


@pytest.mark.parametrize("name", DECODES)
def test_a_whole_decode_under_recorded_randomness_gives_the_recorded_text(model, recorded, name):
    decoded, log = replay(model, recorded, name)
    assert decoded.tokens == recorded[f"decode.{name}.ids"].tolist()
    tokenizer = load_tokenizer(FOLDER / "model")
    assert tokenizer.decode(decoded.tokens[0]) == DECODES[name]["sampled_sequences"]
    asked = DECODES[name]["kwargs"]
    blocks = asked["max_seq_length"] // asked["decoding_block_size"]
    assert decoded.nfe == blocks * asked["total_t"]
    assert len(log) == DECODES[name]["n_draws"]


def test_every_recorded_draw_is_met(model, recorded):
    _, log = replay(model, recorded, "bos_context")
    prefix = "decode.bos_context.draw."
    draws = {name.removeprefix(prefix): t for name, t in recorded.items() if prefix in name}
    assert draws
    for name, tensor in draws.items():
        assert torch.equal(log[int(name.split(".")[0])], tensor), name


def test_the_masked_language_model_is_the_recorded_one(model, recorded):
    logits = model.roberta(input_ids=recorded["roberta.input_ids"]).logits
    expected = recorded["roberta.logits"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


def recorded_totals():
    pieces = load("ssd_lm/pieces.safetensors")
    return sorted({int(name.split(".")[1]) for name in pieces if name.startswith("time.")})


@pytest.mark.parametrize("total_t", recorded_totals())
def test_the_noise_schedule_is_the_recorded_one(total_t):
    pieces = load("ssd_lm/pieces.safetensors")
    for i, t in enumerate(pieces[f"time.{total_t}.t"].tolist()):
        now, before = alpha_bar(int(t), total_t), alpha_bar(int(t) - 1, total_t)
        alpha = now / before
        ours = {
            "alpha_t_bar": now,
            "alpha_t_minus_bar": before,
            "alpha_t": alpha,
            "beta_t": 1 - alpha,
            "beta_t_til": (1 - before) / (1 - now) * (1 - alpha),
        }
        for name, value in ours.items():
            expected = pieces[f"time.{total_t}.{name}"][i].item()
            rel = 0 if name.endswith("bar") else 2e-4  # ratios of float32 numbers
            assert value == pytest.approx(expected, rel=rel, abs=1e-6), name


def test_the_schedule_runs_from_text_to_noise():
    assert alpha_bar(0, 25) == 1
    assert alpha_bar(25, 25) == pytest.approx(0, abs=1e-12)
    values = [alpha_bar(t, 1000) for t in range(1001)]
    assert values == sorted(values, reverse=True)


def recorded_top_ps():
    names = [n for n in load("ssd_lm/pieces.safetensors") if n.endswith(".multinomial")]
    return sorted(float(n.split("=")[1].removesuffix(".multinomial")) for n in names)


@pytest.mark.parametrize("top_p", recorded_top_ps())
def test_the_projection_draws_the_recorded_tokens(top_p):
    pieces = load("ssd_lm/pieces.safetensors")
    logits = pieces["proj.logits"]
    torch.manual_seed(2335)
    filtered = logits.masked_fill(~nucleus(logits, top_p, stable=False), -1e10)
    drawn = torch.distributions.Categorical(logits=filtered).sample()
    assert torch.equal(drawn.view(-1, 1), pieces[f"proj.p={top_p}.multinomial"])
    one_hot = torch.nn.functional.one_hot(drawn, logits.shape[-1])
    assert torch.equal(one_hot * 2 * 5 - 5, pieces[f"proj.p={top_p}"])


# The projection: a draw from the nucleus


def test_the_nucleus_keeps_the_token_that_crosses_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = {p: nucleus(logits, p).tolist() for p in (0.4, 0.6, 0.9, 1.0)}
    assert kept[0.4] == [True, False, False, False]
    assert kept[0.6] == [True, True, False, False]
    assert kept[0.9] == [True, True, True, False]
    assert kept[1.0] == [True, True, True, True]


def test_of_tied_tokens_the_lower_id_is_kept():
    assert nucleus(torch.zeros(4), 0.5).tolist() == [True, True, False, False]
    drawn = draw_from_nucleus(torch.zeros(500, 4), 0.5, torch.arange(500))
    assert set(drawn.tolist()) == {0, 1}


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.95, 1.0])
def test_draws_follow_the_renormalised_nucleus(top_p):
    """Chi-square over 20 000 draws at a false alarm of 1e-4; nothing outside is ever drawn."""
    from scipy.stats import chisquare

    logits, count = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, -1.0, -1.5]), 20_000
    kept = nucleus(logits, top_p)
    drawn = draw_from_nucleus(logits.expand(count, -1), top_p, torch.arange(count) * 7919)
    seen = drawn.bincount(minlength=len(logits)).double()
    assert not seen[~kept].any()
    if kept.sum() > 1:
        expected = logits[kept].double().softmax(0) * count
        assert chisquare(seen[kept].numpy(), expected.numpy()).pvalue > 1e-4


def test_a_nucleus_that_is_rarely_hit_is_sorted_out(monkeypatch):
    monkeypatch.setattr(ssd_decode, "TRIES", 1)
    logits = torch.linspace(0, 0.01, 300).expand(400, -1)
    drawn = draw_from_nucleus(logits, 0.05, torch.arange(400))
    assert nucleus(logits[0], 0.05)[drawn].all()
    assert len(set(drawn.tolist())) > 10


# Batches, streams, contexts


def texts(model, contexts, indices, *, seed=3, blocks=2, total_t=4, size=6):
    def noise(block):
        return RowNoise(seed, indices, block, (size, model.vocab_size), model.device)

    chosen = [contexts[i] for i in indices]
    return decode(
        model, chosen, noise, blocks=blocks, total_t=total_t, top_p=0.95, one_hot_value=5
    ).tokens


@pytest.mark.parametrize(
    "contexts",
    [[[299]] * 5, [[]] * 5, [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], [10, 11]]],
    ids=["bos", "none", "mixed"],
)
def test_a_text_depends_on_seed_and_index_alone(model, contexts):
    last = model.vocab_size - 1
    contexts = [[min(token, last) for token in context] for context in contexts]
    together = texts(model, contexts, [0, 1, 2, 3, 4])
    assert [texts(model, contexts, [i])[0] for i in range(5)] == together
    assert texts(model, contexts, [4, 1]) == [together[4], together[1]]
    assert len({tuple(text) for text in together}) == 5
    assert texts(model, contexts, [0], seed=4) != [together[0]]


def test_a_longer_text_begins_with_the_shorter_one(model):
    short = texts(model, [[1]], [0], blocks=2)[0]
    assert texts(model, [[1]], [0], blocks=3)[0][: len(short)] == short


def test_batched_logits_are_those_of_one_sample(model):
    """Contexts of different lengths are padded; a block's logits do not notice."""
    contexts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    x = torch.randn(3, 6, model.vocab_size, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        batch = model.logits(model.context(contexts), model.embed(x, 0.5))
        for i, context in enumerate(contexts):
            alone = model.logits(model.context([context]), model.embed(x[i : i + 1], 0.5))
            torch.testing.assert_close(batch[i], alone[0], rtol=0, atol=1e-5)


def test_a_block_sees_the_block_before_it_alone(model):
    seen = []

    class Spy(SSDLM):
        def context(self, ids):
            seen.append([list(map(int, row)) for row in ids])
            return super().context(ids)

    spy = Spy(**vars(model))
    (tokens,) = texts(spy, [[7, 8, 9]], [0], blocks=3)
    assert seen == [[[7, 8, 9]], [tokens[:6]], [tokens[6:12]]]


def test_the_published_loop_written_out_gives_the_same_text(model):
    """One-hot tensors, a softmax of the whole vocabulary, RoBERTa on the whole input."""
    noise = RowNoise(1, [0], 0, (6, model.vocab_size), "cpu")
    context = torch.tensor([[3, 4]])
    x = 5 * noise.gaussian()
    with torch.no_grad():
        for t in range(4, 0, -1):
            z = noise.gaussian()
            time = model.time_weight * t / 4 + model.time_bias
            block = x.softmax(-1) @ model.embed_sum.T + time
            before = model.roberta.get_input_embeddings()(context)
            logits = model.roberta(inputs_embeds=torch.cat([before, block], 1)).logits[:, 2:]
            one_hot = torch.nn.functional.one_hot(noise.choose(logits, 0.95), model.vocab_size)
            signal = alpha_bar(t - 1, 4)
            x = signal**0.5 * (one_hot * 10 - 5) + (1 - signal) ** 0.5 * 5 * z
    assert logits.argmax(-1).tolist() == texts(model, [[3, 4]], [0], seed=1, blocks=1)


@pytest.mark.gpu
def test_a_gpu_decodes_like_the_cpu_under_the_same_randomness(model):
    from ssd_model import pick_device

    device = pick_device(None)
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    there = load_model(FOLDER / "model", device)
    x = torch.randn(3, 6, model.vocab_size) * 5
    contexts = [[5, 6, 7], [8], []]
    with torch.no_grad():
        here = model.logits(model.context(contexts), model.embed(x, 0.5))
        far = there.logits(there.context(contexts), there.embed(x.to(device), 0.5))
    torch.testing.assert_close(far.cpu(), here, rtol=0, atol=1e-4)
    keys = torch.arange(300)
    rows = here[0, :1].expand(300, -1).contiguous()
    drawn = draw_from_nucleus(rows.to(device), 0.95, keys.to(device))
    assert (drawn.cpu() == draw_from_nucleus(rows, 0.95, keys)).float().mean() > 0.99
    together = texts(there, contexts, [0, 1, 2])
    assert [texts(there, contexts, [i])[0] for i in range(3)] == together


def test_decoding_needs_no_gradients(model):
    assert not any(parameter.requires_grad for parameter in model.roberta.parameters())
    logits = model.logits(model.context([[1]]), model.embed(torch.zeros(1, 2, model.vocab_size), 1))
    assert logits.grad_fn is None
