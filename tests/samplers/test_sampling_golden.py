"""The recorded samplers of the authors, replayed: their random numbers through our generators."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, load, load_json
from networks import CHECKPOINTS, LOGITS, MASK, assert_within, recorded
from sampling_tools import denoiser, recorded_denoiser, write

from noise_schedule import total_noise
from samplers import draw as draw_module
from samplers.analytic import next_log_probs, reverse_chances, staggered, transition
from samplers.nucleus import nucleus
from samplers.params import Warp
from samplers.steps import STEPS, Planned, RevealPlan
from samplers.stopping import ENTROPY_TOKENS, entropy, find_stop, low_entropy
from sampling.notebook import load as load_writer

STEPS_GOLDEN = load_json("sampling/ddpm_update.json")
RUNS = load_json("sampling/e2e.json")
STOPS = load_json("sampling/stop_conds.json")
BOS = STOPS["eos_token_id"]  # GPT-2: BOS is EOS


def overrides(entry):
    return dict(item.split("=") for item in entry["overrides"])


def test_the_nucleus_is_the_recorded_one():
    """Among equal probabilities the reference keeps any, we the smallest id: there the kept values
    count."""
    golden = load("sampling/nucleus.safetensors")
    block = int(golden["block_size"])
    for name in [k for k in golden if k.startswith("p=")]:
        ours = nucleus(golden["p_x0"].log(), float(name[2:])).softmax(-1)
        for row, theirs, before in zip(
            *(x[:, -block:].flatten(0, 1) for x in (ours, golden[name], golden["p_x0"])),
            strict=True,
        ):
            if len(before.unique()) < len(before):
                row, theirs = row.sort().values, theirs.sort().values
            torch.testing.assert_close(row, theirs, msg=name)


def noise_of(u):
    """The reference's Gumbel noise: its choice is the argmax of p / (1e-10 - log(u + 1e-10))."""
    return -(1e-10 - (u + 1e-10).log()).log()


@pytest.mark.parametrize("name", [k for k, v in STEPS_GOLDEN.items() if v["t"] > 0])
def test_one_update_asks_for_the_recorded_distribution_and_makes_the_recorded_choice(name):
    """t = 0 is left out: there the reference divides by zero (reference-quirks.md)."""
    entry, golden = STEPS_GOLDEN[name], load("sampling/ddpm_update.safetensors")
    piece = {k.removeprefix(name + "."): v for k, v in golden.items() if k.startswith(name + ".")}
    _, denoise = recorded_denoiser(entry["checkpoint"])
    x, t, dt = piece["x"], piece["t"], piece["dt"]
    noise = noise_of(piece["draw.000.rand_like"])
    block = torch.arange(x.shape[1] - noise.shape[1], x.shape[1]).expand(len(x), -1)
    given = piece.get("p_x0_given", piece.get("p_x0"))
    p = float(overrides(entry).get("sampling.nucleus_p", 1))
    ours = nucleus(denoise(x, block), p).log_softmax(-1)
    hidden = x.gather(1, block) == MASK
    if "p_x0" in piece:
        assert_within(ours.exp()[hidden], given[hidden].float(), LOGITS, name)
    log_p = given.log()
    if overrides(entry)["sampling.first_hitting"] == "true":
        order = hidden[0].nonzero()[int(piece["draw.001.randint"])]
        choice = hidden & (torch.arange(len(hidden[0])) == order)
        token = (log_p + noise).argmax(-1)
    else:
        stay = (t - dt) / t  # p(s) / p(t) of the loglinear schedule
        q = log_p + (1 - stay).log()
        q[..., MASK] = stay.log()
        token = (q + noise).argmax(-1)
        choice = hidden
    new = x.scatter(1, block, token.where(choice, x.gather(1, block)))
    assert torch.equal(new, piece["x_new"])


def replay_first_hitting(entry, block, windows):
    """Per block or window, the recorded order of positions and the noise of each draw.

    The random numbers do not depend on the network: which positions are hidden follows from the
    draws alone. windows: (start of the tokens the noise is about, hidden positions).
    """
    torch.manual_seed(entry["seed"])
    np.random.seed(entry["seed"])
    plans, times = [], []
    for start, hidden in windows:
        plan, t, hidden = [], 1.0, list(hidden)
        while hidden:
            t *= np.random.rand() ** (1 / len(hidden))
            u = torch.rand((1, block, MASK + 1), dtype=torch.float64)
            position = hidden.pop(int(torch.randint(0, len(hidden), (1,))))
            plan.append((position, noise_of(u[0, position - start])))
            times.append(t)
        plans.append(plan)
    return plans, times


def inject(monkeypatch, plans):
    """Our rounds with the recorded order and noise in place of our own."""
    orders = iter(plans)
    noise = iter([n for plan in plans for _, n in plan])

    def recorded_order(keys, row, position, params):
        order = torch.tensor([p for p, _ in next(orders)])
        return RevealPlan(row, order, torch.arange(len(order)), torch.zeros_like(order))

    monkeypatch.setitem(STEPS, "first_hitting", Planned(recorded_order))
    monkeypatch.setattr(draw_module, "draw", lambda lp, key, *_: (lp + next(noise)).argmax(-1))


FIRST_HITTING = [
    name
    for name, run in RUNS.items()
    if run["out_shape"]
    and name.startswith(("bd3lm_fh", "mdlm_fh", "hf_fh"))
    and run["n_updates"] < 100
]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", FIRST_HITTING)
def test_first_hitting_writes_the_recorded_text(monkeypatch, name, cached):
    """Left out: the reference's cache with block size 1, which forgets BOS, and its cache past the
    window, which is another function than ours (reference-quirks.md)."""
    entry = RUNS[name]
    if name.startswith("hf"):
        writer = load_writer(GOLDEN / "hf_export", tokenizer=str(GOLDEN / "tokenizer"))
        algo, denoise, size = writer.algo, writer.denoise, entry["block_size"]
    else:
        size = CHECKPOINTS[entry["checkpoint"]]["block_size"]
        algo, denoise = recorded_denoiser(entry["checkpoint"])
    if entry.get("equals_no_cache") is False:
        pytest.skip("the reference never stores BOS")
    if cached and (algo == "mdlm" or "window" in name):
        pytest.skip("no cache for mdlm; past the window a cached run is another function")
    if name == "bd3lm_fh_window_kv":
        pytest.skip("the reference's cache mixes evicted blocks in")
    length = entry["out_shape"][1]
    note = entry.get("note", "")
    context = int(note.split("=")[1]) if "=" in note else 1024
    block = size if algo == "bamdlm" else length
    windows = [(s, range(max(s, 1), s + block)) for s in range(0, length, block)]
    windows = [w for w in windows if len(w[1])]
    plans, times = replay_first_hitting(entry, block, windows)
    inject(monkeypatch, plans)
    p = float(overrides(entry).get("sampling.nucleus_p", 1))
    (sample,) = write(
        algo,
        denoise,
        1,
        length=length,
        bos_id=BOS,
        block_size=block,
        context_size=context,
        window=length,
        nucleus_p=p,
        kv_cache=cached,
    )
    assert sample.tokens.tolist() == load("sampling/e2e.safetensors")[f"{name}.ids"][0].tolist()
    assert sample.nfe == entry["nfe"]
    trace = [update[2][0][2] for update in entry["trace"]]
    assert [int(sample.tokens[p]) for plan in plans for p, _ in plan] == trace
    # the time never enters: the network is not told it. The reference's is the one that we describe
    np.testing.assert_allclose(times, [update[0] for update in entry["trace"]], rtol=1e-5)


@pytest.mark.slow
def test_mdlm_moves_its_windows_by_half_as_recorded(monkeypatch):
    entry = RUNS["mdlm_semi_ar_fh"]
    _, denoise = recorded_denoiser("mdlm")
    window, length = entry["block_size"], entry["length"]
    spans = [(0, range(1, window))]
    for start in range(window // 2, length - window + 1, window // 2):
        spans.append((start, range(start + window // 2, start + window)))
    plans, _ = replay_first_hitting(entry, window, spans)
    inject(monkeypatch, plans)
    (sample,) = write("mdlm", denoise, 1, length=length, bos_id=BOS, window=window)
    golden = load("sampling/e2e.safetensors")["mdlm_semi_ar_fh.ids"]
    assert torch.equal(sample.tokens, golden[0])
    assert sample.nfe == entry["nfe"]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["ar", "ar_nucleus", "ar_varlen"])
def test_ar_writes_the_recorded_text(monkeypatch, name, cached):
    entry = RUNS[name]
    _, denoise = recorded_denoiser("ar")
    rows = entry["out_shape"][0]
    torch.manual_seed(entry["seed"])
    gumbel = torch.distributions.Gumbel(0, 1)
    monkeypatch.setattr(
        draw_module,
        "draw",
        lambda log_p, key, *_: (log_p + gumbel.sample((rows, MASK + 1))).argmax(-1),
    )
    samples = write(
        "ar",
        denoise,
        rows,
        length=entry["length"],
        bos_id=BOS,
        eos_id=BOS,
        batch_size=rows,
        nucleus_p=float(overrides(entry).get("sampling.nucleus_p", 1)),
        var_length=name == "ar_varlen",
        kv_cache=cached,
    )
    golden = load("sampling/e2e.safetensors")[f"{name}.ids"]
    assert [s.tokens.tolist() for s in samples] == golden.tolist()
    assert samples[0].nfe == golden.shape[1] - 1


def test_block_diffusion_of_variable_length_stops_as_recorded(monkeypatch):
    entry = RUNS["bd3lm_varlen"]
    size = CHECKPOINTS[entry["checkpoint"]]["block_size"]
    algo, denoise = recorded_denoiser(entry["checkpoint"])
    spans = [(s, range(max(s, 1), s + size)) for s in range(0, entry["length"], size)]
    plans, _ = replay_first_hitting(entry, size, spans)
    inject(monkeypatch, plans)
    (sample,) = write(
        algo,
        denoise,
        1,
        length=entry["length"],
        bos_id=BOS,
        eos_id=BOS,
        block_size=size,
        kv_cache=True,
        var_length=True,
    )
    golden = load("sampling/e2e.safetensors")["bd3lm_varlen.ids"][0]
    assert sample.tokens.tolist() == golden.tolist()
    # the reference looks for EOS only from 256 tokens on, and pays for what it then cuts away
    assert sample.nfe == -(-len(golden) // size) * size - 1 <= entry["nfe"]


def test_sedd_makes_the_recorded_transitions():
    golden = load("sampling/sedd.safetensors")
    score = denoiser(recorded("sedd"), "sedd", MASK)
    x, t, dt = golden["x"], golden["t"], golden["dt"]
    sigma_t, sigma_s = total_noise(t), total_noise(t - dt)
    torch.testing.assert_close(sigma_t, golden["p=1.0.sigma_t"])
    torch.testing.assert_close(sigma_s, golden["p=1.0.sigma_s"])
    log_score = score(x, sigma_t[:, 0])
    visible = x != MASK
    hidden = ~visible
    ours = log_score.exp()[hidden]
    assert_within(ours.double(), golden["p=1.0.score"][hidden], LOGITS, "score")
    dsigma = (sigma_t - sigma_s)[:, 0]
    stag = staggered(log_score.exp(), dsigma, MASK)
    assert_within(stag[hidden].double(), golden["p=1.0.staggered"][hidden], LOGITS, "staggered")
    assert_within(transition(x, dsigma, MASK + 1, MASK), golden["p=1.0.transp"], LOGITS, "edge")
    for kind, change in (("analytic", dsigma), ("denoiser", sigma_t[:, 0])):
        last = kind == "denoiser"
        chances = reverse_chances(log_score, x, change, MASK, last)
        probs = golden[f"p=1.0.{kind}.probs"]
        assert_within(chances[hidden].double(), probs[hidden], LOGITS, kind)
        log_probs = next_log_probs(chances, Warp(), MASK)
        torch.manual_seed(1984)
        u = torch.rand(probs.shape, dtype=torch.float64)
        new = (log_probs + noise_of(u)).argmax(-1).where(hidden, x)
        assert torch.equal(new, golden[f"p=1.0.{kind}.x_new"])


def test_the_nucleus_of_sedd_leaves_the_chance_to_stay_hidden_alone():
    """Mended: the reference filters the score and collapses to id 0 (reference-quirks.md)."""
    golden = load("sampling/sedd.safetensors")
    probs, hidden = golden["p=1.0.analytic.probs"], golden["x"] == MASK
    plain = next_log_probs(probs, Warp(), MASK)[hidden].exp()
    filtered = next_log_probs(probs, Warp(nucleus_p=0.9), MASK)[hidden].exp()
    torch.testing.assert_close(filtered[:, MASK], plain[:, MASK])
    alone = plain.clone()
    alone[:, MASK] = 0
    alone /= alone.sum(-1, keepdim=True)
    kept = nucleus(alone.log(), 0.9).softmax(-1) * (1 - plain[:, MASK:])
    torch.testing.assert_close(filtered[:, :MASK], kept[:, :MASK])


@pytest.mark.parametrize("name", ["sedd", "sedd_nostop"])
def test_sedd_writes_the_recorded_text(monkeypatch, name):
    entry = RUNS[name]
    _, score = recorded_denoiser("sedd")
    torch.manual_seed(entry["seed"])

    def draw(log_p, key, *_):
        return (log_p + noise_of(torch.rand(log_p.shape, dtype=torch.float64))).argmax(-1)

    monkeypatch.setattr(draw_module, "draw", draw)
    (sample,) = write(
        "sedd",
        score,
        1,
        length=entry["length"],
        bos_id=BOS,
        num_steps=entry["nfe"],
        reject_low_entropy=False,
    )
    golden = load("sampling/e2e.safetensors")[f"{name}.ids"]
    assert torch.equal(sample.tokens, golden[0])
    assert sample.nfe == entry["nfe"] + 1  # the denoising step is an evaluation too


@pytest.mark.parametrize("case", list(STOPS["cases"]))
def test_a_text_stops_where_the_recording_does(case):
    """Mended: looked at only where 256 tokens exist; the earlier of two cuts; each row for
    itself.
    """
    entry = STOPS["cases"][case]
    for row in torch.tensor(STOPS["x"][entry["x"]]):
        if len(row) >= ENTROPY_TOKENS and "batch" not in case:
            assert entropy(row[-ENTROPY_TOKENS:]) == pytest.approx(entry["entropy_last_256"], 1e-5)
        found = find_stop(row, len(row), [len(row)], 0, 0, STOPS["eos_token_id"])
        if case.endswith("var_length=False"):
            if len(row) >= ENTROPY_TOKENS and "batch" not in case:
                assert low_entropy(row) == entry["stop"]
            continue
        if len(row) < ENTROPY_TOKENS:
            assert found is None
        elif "batch" in case:
            eos = (row[1:] == STOPS["eos_token_id"]).nonzero()
            assert (found is None) == (len(eos) == 0)
            assert found is None or found.length == int(eos[0]) + 2
        elif entry["stop"]:
            eos = (row[1:] == STOPS["eos_token_id"]).nonzero()
            cuts = [len(row) - ENTROPY_TOKENS] if low_entropy(row) else []
            cuts += [int(eos[0]) + 2] if len(eos) else []
            assert found.length == min(cuts)
            if len(cuts) == 1:
                assert found.length == entry["out_shape"][1]
        else:
            assert found is None
