"""model.param_dtype=bfloat16: weights in bfloat16, and float32 masters of what is trained."""

import itertools
import json
import shutil

import pytest
import torch
from hub_folders import with_tokenizer
from networks import allocated, small, texts
from runs import differences, ends_with_2, finish, ranks, read, tiny, tiny_of_checkpoint
from test_training import data, module, trainer

import main
import settings
from checkpointing.layouts import read_checkpoint
from diffusion import Diffusion
from models.llama import Llama
from models.lora import Adapter, adapt, of_adapter
from noise_schedule import get_schedule
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import draw_example_noise
from training.log_reading import read_log
from training.optimizers import Masters, OptimizerSettings, build_optimizer

LAST = "checkpoints/last.ckpt"
HALF = ["model.param_dtype=bfloat16", "trainer.precision=bf16"]
BLOCKS = ["algo=bamdlm", "block_size=4", "training.ema=0.5"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of a run of ten steps, each of two micro-batches, with dropout and two validations."""
    return [*tiny(tmp_path_factory.mktemp("data")), *BLOCKS]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(words, request, tmp_path_factory):
    """(words, folder) of a run that nothing disturbed."""
    place = tmp_path_factory.mktemp(request.param) / "run"
    given = [*words, *HALF, f"optim={request.param}", "callbacks.checkpoint_monitor=null"]
    given += ["checkpointing.keep_last=-1", f"checkpointing.save_dir={place}"]
    assert main.main(given) == 0
    return given, place


def of_network(raw):
    state = raw["state_dict"].items()
    return {k.removeprefix("backbone."): v for k, v in state if k.startswith("backbone.")}


def test_weights_are_the_masters_rounded_after_every_step(words, tmp_path, monkeypatch):
    apart, real = [], Diffusion.optimizer_step

    def step(self, *arguments, **named):
        real(self, *arguments, **named)
        masters, weights = self.backbone.masters, dict(self.backbone.named_parameters())
        assert masters.keys() == weights.keys() == self.ema.shadow.keys()
        for name, p in weights.items():
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, masters[name].bfloat16()), name
            assert p.grad is None
            assert self.ema.shadow[name].dtype == torch.float32
        apart.append(any((p != masters[name]).any() for name, p in weights.items()))

    monkeypatch.setattr(Diffusion, "optimizer_step", step)
    assert main.main([*words, *HALF, f"checkpointing.save_dir={tmp_path / 'run'}"]) == 0
    assert apart == [True] * 10


def rounded(weights):
    return {name: w.bfloat16().float() for name, w in weights.items()}


@pytest.mark.parametrize(("algo", "batch_size"), [("bamdlm", 4), ("bamdlm", 8), ("ar", 4)])
def test_masters_are_those_of_a_run_that_is_rounded_by_hand(algo, batch_size, tmp_path):
    """Bit for bit, as are the averages: AdamW on float32 weights, whose passes are of a network
    with the rounded ones, and whose gradients are rounded after each pass."""
    ours, steps, passes = module(algo, masters=True), 8, 8 // batch_size
    t = trainer(tmp_path, steps, accumulate=passes, precision="bf16-mixed")
    t.fit(ours, datamodule=data(batch_size))

    hand, held = module(algo), module(algo)
    weights = dict(held.backbone.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), fused=True, **held.optimizer_settings.adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, held.lr_factor)
    batches = iter(data(batch_size).train_dataloader())
    for _ in range(steps):
        hand.backbone.load_state_dict({**hand.backbone.state_dict(), **rounded(weights)})
        optimizer.zero_grad()
        for batch in itertools.islice(batches, passes):
            with torch.autocast("cpu", torch.bfloat16):
                loss = hand.training_step(batch, 0)
            (loss / passes).backward()
            for name, p in hand.backbone.named_parameters():
                grad, old = p.grad.bfloat16().float(), weights[name].grad
                weights[name].grad, p.grad = grad if old is None else old + grad, None
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        held.ema.update(weights.items())
    for name, weight in weights.items():
        assert torch.equal(ours.backbone.masters[name], weight), name
        assert torch.equal(ours.ema.shadow[name], held.ema.shadow[name]), name


def test_a_rate_that_is_small_moves_masters_and_not_weights_alone():
    """Steps of 1e-5 on weights near 0.3, which lie 2e-3 apart in bfloat16."""
    adamw = {"lr": 1e-5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    kept, alone = small(), small().bfloat16()
    kept.masters = Masters(kept)
    begin = {name: p.clone() for name, p in kept.named_parameters()}
    optimizers = [build_optimizer(net, OptimizerSettings(adamw), False) for net in (kept, alone)]
    for _ in range(300):
        for net, optimizer in zip((kept, alone), optimizers, strict=True):
            optimizer.zero_grad()
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            if net is kept:
                net.masters.collect()
            optimizer.step()
        kept.masters.round()
    name = "blocks.0.attn_qkv.weight"
    large = begin[name].abs() > 0.25
    assert large.sum() > 100
    assert torch.equal(alone.get_parameter(name)[large], begin[name][large])
    moved = (kept.get_parameter(name) - begin[name]).detach()[large]
    assert float(moved.float().mean()) == pytest.approx(-300 * 1e-5, rel=0.05)


def test_it_learns_what_a_run_in_float32_learns(words, tmp_path):
    """Each of five validations in twenty steps at a rate of 1e-2 is within 0.5%."""
    found = []
    for number, more in enumerate(([], HALF)):
        given = [*words, *more, "trainer.max_steps=20", "model.dropout=0"]
        assert main.main([*given, f"checkpointing.save_dir={tmp_path / str(number)}"]) == 0
        found.append(read_log(tmp_path / str(number) / "metrics.csv")["val/nll"])
    assert found[0].keys() == {4, 8, 12, 16, 20}
    assert found[1] == pytest.approx(found[0], rel=5e-3)
    assert found[0][20] < found[0][4] - 0.3


def test_a_run_that_goes_on_ends_the_same_bit_for_bit(whole):
    given, place = whole
    expected, kept = read(place / LAST), place.with_name("kept")
    shutil.move(place, kept)
    try:
        assert main.main([*given, "trainer.max_steps=4"]) == 0
        assert main.main(given) == 0
        assert differences(read(place / LAST), expected) == []
    finally:
        shutil.rmtree(place)
        shutil.move(kept, place)


def test_a_checkpoint_is_like_that_of_a_run_in_float32(whole, words, tmp_path):
    """Names, shapes and formats of everything in it, but for the two settings."""
    given, place = whole
    plain = [word for word in given if word not in HALF and "save_dir" not in word]
    assert main.main([*plain, f"checkpointing.save_dir={tmp_path / 'run'}"]) == 0

    def kinds(value):
        if isinstance(value, dict):
            return {key: kinds(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [kinds(each) for each in value]
        is_tensor = isinstance(value, torch.Tensor)
        return (value.dtype, value.shape) if is_tensor else type(value)

    ours, theirs = read(place / LAST), read(tmp_path / "run" / LAST)
    assert kinds(ours) == kinds(theirs)
    assert all(value.dtype == torch.float32 for value in of_network(ours).values())
    masters = of_network(ours)
    assert any((value != value.bfloat16()).any() for value in masters.values())


@pytest.mark.parametrize("whole", ["adamw"], indirect=True)
def test_every_reader_gets_the_masters(whole, words, tmp_path, capsys):
    """mode=ppl_eval measures in float32 whatever the setting, and in bfloat16 what the run's own
    validation did: averages that are rounded before they are used, or in products."""
    _, place = whole
    nll = {}
    for name, more in (("plain", []), ("set", HALF[:1]), ("half", HALF[1:])):
        folder = tmp_path / name
        used = [*words, *more, "mode=ppl_eval", "trainer.num_sanity_val_steps=0"]
        used += [f"eval.checkpoint_path={place / 'checkpoints/step=8.ckpt'}"]
        assert main.main([*used, f"checkpointing.save_dir={folder}"]) == 0
        (path,) = folder.glob("ppl_*.json")
        nll[name] = json.loads(path.read_text())["nll"]
    assert nll["plain"] == nll["set"]
    assert "model.param_dtype has no effect: mode=ppl_eval" in capsys.readouterr().err
    validated = read_log(place / "metrics.csv")["val/nll"][8]
    assert nll["half"] == pytest.approx(validated, rel=1e-3)
    assert nll["half"] == pytest.approx(nll["plain"], rel=1e-2)


@pytest.mark.parametrize("whole", ["adamw"], indirect=True)
def test_layers_that_are_made_again_change_nothing(whole, words, tmp_path):
    given, place = whole
    again = [*given, "model.activation_checkpointing=full"]
    assert main.main([*again, f"checkpointing.save_dir={tmp_path / 'run'}"]) == 0
    ours, theirs = read(tmp_path / "run" / LAST), read(place / LAST)
    for part in ("state_dict", "ema", "optimizer_states"):
        assert differences(ours[part], theirs[part]) == []


def test_two_processes_train_as_one(words, tmp_path):
    """Gradients of passes and devices are summed in float32: only the order of sums differs."""
    given = [*words, *HALF, "model.dropout=0", "loader.batch_size=2", "trainer.gradient_clip_val=1"]
    given += ["loader.eval_global_batch_size=4", "trainer.limit_val_batches=0"]
    given += ["callbacks.checkpoint_monitor=null"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main.main([*given, f"checkpointing.save_dir={one}"]) == 0
    given += ["trainer.devices=2", f"checkpointing.save_dir={two}"]
    assert finish(ranks(2, given, tmp_path / "log")) == [0, 0], (tmp_path / "log-0").read_text()
    ours, theirs = read(two / LAST), read(one / LAST)
    for name, value in of_network(theirs).items():
        torch.testing.assert_close(of_network(ours)[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(words, tmp_path, monkeypatch):
    """Neither a master nor a weight, moment or average; the steps after it count."""
    real, seen = Diffusion.training_loss, []

    def loss(self, inputs):
        bad = self.trainer.global_step < 2
        if self.trainer.global_step in (0, 2):
            seen.append({name: m.detach().clone() for name, m in self.backbone.masters.items()})
        return real(self, inputs) * (float("nan") if bad else 1)

    monkeypatch.setattr(Diffusion, "training_loss", loss)
    place = tmp_path / "run"
    given = [*words, *HALF, "trainer.max_steps=4", f"checkpointing.save_dir={place}"]
    assert main.main(given) == 0
    assert all(torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])
    raw = read(place / LAST)
    (optimizer,) = raw["optimizer_states"]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {2.0}
    assert raw["ema"]["num_updates"] == 2
    assert any((value != seen[0][name]).any() for name, value in of_network(raw).items())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(words, folder of the base) of a run by LoRA on a Llama."""
    folder = with_tokenizer(tmp_path_factory.mktemp("model"))
    given = [*tiny_of_checkpoint(tmp_path_factory.mktemp("text")), *BLOCKS, *HALF]
    given += ["algo.backbone=llama", "lora.rank=2", f"training.from_pretrained={folder}"]
    return [*given, f"data.tokenizer_name_or_path={folder}"], folder


def test_frozen_weights_are_in_bfloat16_and_have_no_master(adapters, tmp_path, monkeypatch):
    words, folder = adapters
    real, seen = Diffusion.on_fit_start, []
    monkeypatch.setattr(
        Diffusion, "on_fit_start", lambda self: (seen.append(self.backbone), real(self))[1]
    )
    place, words = tmp_path / "run", [*words, "trainer.max_steps=6"]
    assert main.main([*words, f"checkpointing.save_dir={place}"]) == 0
    (net,), base = seen, read_checkpoint(folder).weights
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    own = of_adapter(dict(net.named_parameters()))
    assert net.masters.keys() == own.keys()
    state = of_network(read(place / LAST))
    assert {value.dtype for value in state.values()} == {torch.float32}
    for name in base.keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(state[name], base[name].bfloat16().float()), name
    for name, master in net.masters.items():
        assert torch.equal(state[name], master)
        assert torch.equal(own[name], master.bfloat16())
    expected, kept = read(place / LAST), tmp_path / "kept"
    shutil.move(place, kept)
    place = f"checkpointing.save_dir={place}"
    assert main.main([*words, place, "trainer.max_steps=4"]) == 0
    assert main.main([*words, place]) == 0
    assert differences(read(tmp_path / "run" / LAST), expected) == []


def memory(half, adapters):
    """MiB of a step: weights, masters, moments, and what comes and goes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "n_blocks": 8, "n_heads": 6, "n_kv_heads": 2, "head_dim": 64}
    net = Llama(vocab_size=8192, ffn_size=1024, **shape)
    if adapters:
        adapt(net, Adapter(rank=8, alpha=16.0, mask_id=8191))
    net.masters = Masters(net) if half else None
    adamw = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = build_optimizer(net, OptimizerSettings(adamw), fused=True)
    objective = MaskedDiffusion(8191, 16, get_schedule("loglinear"))
    given = {"global_batch": 1, "length": 128, "block_size": 16, "antithetic": True}
    noise = draw_example_noise(1, torch.arange(1), **given)
    asked = {"interval": (1e-3, 1.0), "training": True}
    inputs = objective.loss_inputs(texts(1, 128, 8191), torch.ones(1, 128), noise, **asked)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective.compute_loss(net, inputs).per_place
        loss.backward()
        if half:
            net.masters.collect()
        optimizer.step()
        if half:
            net.masters.round()
        optimizer.zero_grad()

    step()
    own = [*net.parameters(), *(net.masters or {}).values()]
    own += [each for state in optimizer.state.values() for each in state.values()]
    return (sum(x.numel() * x.element_size() for x in own) + allocated(step)) / 2**20


@pytest.mark.parametrize(("adapters", "share"), [(True, 0.6), (False, 1.1)])
def test_what_a_step_takes_of_the_memory(adapters, share):
    """Of 19 million weights and few activations. Frozen ones take two bytes in place of four and
    a copy in two; those that are trained may take more, as masters are beside them."""
    plain, half = memory(False, adapters), memory(True, adapters)
    print(f"{plain:.0f} MiB, with model.param_dtype=bfloat16 {half:.0f}")
    assert half < share * plain


def test_two_processes_train_the_same_adapters(adapters, tmp_path):
    words, _ = adapters
    words = [*words, "lora.dropout=0", "trainer.max_steps=3", "loader.batch_size=2"]
    assert main.main([*words, f"checkpointing.save_dir={tmp_path / 'one'}"]) == 0
    words += [f"checkpointing.save_dir={tmp_path / 'two'}"]
    assert finish(ranks(2, words, tmp_path / "log")) == [0, 0], (tmp_path / "log-0").read_text()
    one, two = (of_network(read(tmp_path / name / LAST)) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "model.param_dtype=bfloat16 needs trainer.precision=bf16-mixed, not 32-true"),
        (
            ["trainer.precision=bf16", "strategy=fsdp", "trainer.devices=2"],
            "model.param_dtype=bfloat16 does not go with strategy=fsdp",
        ),
        (["model.param_dtype=bf16"], "model.param_dtype=bf16 must be one of float32, bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(words, more, said, capsys):
    assert said in ends_with_2([*words, HALF[0], *more], capsys)


def test_run_folders_keep_their_names():
    plain, half = (settings.load(["data=text8", *more]) for more in ([], HALF))
    also = settings.load(["data=text8", "model.param_dtype=float32"])
    assert plain.checkpointing.save_dir == also.checkpointing.save_dir
    assert plain.checkpointing.save_dir != half.checkpointing.save_dir
