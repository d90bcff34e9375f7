"""Training through Lightning: resume, independence of the batch split, validation, checkpoints."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from conftest import GOLDEN, load_json
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import small

from checkpointing.layouts import read_checkpoint
from dataloader import DataModule
from diffusion import ClippingSettings, Diffusion, NoiseSettings
from models.adaptation import PLAIN, Adaptation
from noise_schedule import get_schedule
from objectives import clipping
from objectives.autoregressive import Autoregressive
from objectives.block_diffusion import MaskedDiffusion
from objectives.corruption import EXACT
from objectives.counts import CountLaw, least_variance, to_learn, within
from objectives.sedd import ScoreEntropy
from objectives.sizes import SizeLaw, shares_of_steps, size_at
from training import resuming, validation
from training.checkpoint_io.files import SafeCheckpointIO
from training.lr_schedules import lr_factor
from training.optimizers import OptimizerSettings
from training.state import load_state

LENGTH, MASK, GLOBAL = 16, 6, 8
ALGORITHMS = {
    "ar": lambda: Autoregressive(MASK),
    "bamdlm": lambda: MaskedDiffusion(MASK, 4, get_schedule("loglinear")),
    "mdlm": lambda: MaskedDiffusion(MASK, LENGTH, get_schedule("cosine")),
    "sedd": lambda: ScoreEntropy(MASK, get_schedule("loglinear")),
}
COUNTED = {  # bamdlm with noise by counts: its law, and how many views
    "counts": (to_learn(4), 1),
    "views": (within(1, 4, 4), 2),
}


class MemoryRows:
    """What DataModule reads from: rows in memory instead of a prepared folder."""

    apart = False

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, MASK, (count, LENGTH), generator=generator).numpy()
        self.length = LENGTH

    def __len__(self):
        return len(self.ids)

    def read(self, rows):
        ids = self.ids[rows]
        return ids, ids * 0 + 1


def data(batch_size=4, valid=10):
    return DataModule(
        train=MemoryRows(30, 1),
        valid=MemoryRows(valid, 2),
        length=LENGTH,
        batch_size=batch_size,
        eval_batch_size=4,
        seed=1,
    )


def module(
    algo,
    *,
    ema=0.9,
    dropout=0.0,
    widths=(),
    exact=False,
    block=None,
    fix=False,
    eps=1e-8,
    interval=(1e-3, 1),
    validate_by="nelbo",
    counts=None,
    learn=False,
    views=1,
    momentum=None,
    sizes=None,
    schedule=(),
    adapt=PLAIN,
    ar_loss=0.0,
    masters=False,
):
    if algo in COUNTED:
        algo, (counts, views) = "bamdlm", COUNTED[algo]
    objective = ALGORITHMS[algo]()
    if block:
        objective = MaskedDiffusion(MASK, block, get_schedule("loglinear"))
    if sizes:
        objective = replace(objective, sizes=sizes)
    if adapt != PLAIN:
        objective = replace(objective, adapt=adapt, ar_loss=ar_loss)
    torch.manual_seed(0)
    backbone = small(MASK + 1, adaln=algo != "ar")
    for layer in backbone.blocks:
        layer.dropout = dropout
    return Diffusion(
        backbone=backbone,
        objective=objective,
        noise=NoiseSettings(
            seed=1,
            interval=interval,
            sampling_eps=1e-3,
            antithetic=True,
            global_batch=GLOBAL,
            eval_global_batch=4,
            counts=counts,
            learn_counts=learn,
            views=views,
            block_schedule=dict(schedule),
        ),
        optimizer=OptimizerSettings(
            {"lr": 1e-2, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.0}, momentum, masters
        ),
        lr_factor=lr_factor("constant_warmup", lr=1e-3, max_steps=10, warmup_steps=2),
        ema_decay=ema,
        clip=ClippingSettings(tuple(widths), 0.25, fix) if algo == "bamdlm" else None,
        exact_nll=exact,
        validate_by=validate_by,
        description={"config": {"algo": {"name": algo}}, "tokenizer": {}},
    )


def trainer(
    folder, steps, *, accumulate=2, validate=0, callbacks=(), accelerator="cpu", precision=None
):
    return L.Trainer(
        precision=precision,
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        val_check_interval=validate or None,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        plugins=[SafeCheckpointIO()],
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def saver(folder, every):
    return ModelCheckpoint(
        dirpath=folder, every_n_train_steps=every, save_top_k=-1, filename="{step}"
    )


def trained(algo, folder, steps, *, batch_size=4, resume=None, save_every=0, validate=0, **kwargs):
    m, d = module(algo, **kwargs), data(batch_size)
    if resume:
        found = read_checkpoint(resume)
        d.start_at(found.raw["sampler"]["examples_seen"], found.step)
    callbacks = [saver(folder, save_every)] if save_every else []
    t = trainer(
        folder, steps, accumulate=GLOBAL // batch_size, callbacks=callbacks, validate=validate
    )
    t.fit(m, datamodule=d, ckpt_path=resume)
    return m


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(algo, tmp_path):
    whole = trained(algo, tmp_path / "a", 6, save_every=3)
    resumed = trained(algo, tmp_path / "b", 6, resume=str(tmp_path / "a" / "step=3.ckpt"))
    for (name, ours), theirs in zip(
        resumed.backbone.named_parameters(), whole.backbone.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert torch.equal(resumed.ema.shadow[name], whole.ema.shadow[name]), name


COUNTS = [("bamdlm", within(2, 3, 4)), ("bamdlm", to_learn(4)), ("mdlm", to_learn(LENGTH))]


def test_by_counts_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """mdlm, with a law that is another than the one that a run begins with."""
    law = CountLaw(torch.linspace(0.5, 1.5, LENGTH).double())
    whole = trained("mdlm", tmp_path / "a", 6, save_every=3, counts=law)
    path = str(tmp_path / "a" / "step=3.ckpt")
    resumed = trained("mdlm", tmp_path / "b", 6, resume=path, counts=to_learn(LENGTH))
    assert torch.equal(resumed.count_law.density, law.density)
    pairs = zip(resumed.backbone.parameters(), whole.backbone.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(("algo", "law"), COUNTS)
def test_by_counts_the_split_into_micro_batches_does_not_change_a_run(algo, law, tmp_path):
    one = trained(algo, tmp_path, 4, batch_size=8, eps=1e-3, counts=law)
    four = trained(algo, tmp_path, 4, batch_size=2, eps=1e-3, counts=law)
    for ours, theirs in zip(one.backbone.parameters(), four.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_with_two_views_the_split_into_micro_batches_does_not_change_a_run(tmp_path):
    runs = [trained("views", tmp_path, 4, batch_size=size, eps=1e-3) for size in (8, 2)]
    plain = trained("counts", tmp_path, 4, batch_size=8, eps=1e-3)
    for ours, theirs in zip(*(m.backbone.parameters() for m in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weights = [m.backbone.output_layer.linear.weight for m in (*runs, plain)]
    assert (weights[0] - weights[2]).abs().max() > 1e-3


# blocks of one, of four, and the whole row
SIZES = SizeLaw((1, 4, LENGTH), (0.25, 0.5, 0.25))
BY = {"times": None, "counts": within(1, 1, 1)}


@pytest.mark.parametrize("by", BY)
def test_with_several_block_sizes_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(by, tmp_path):
    given = {"sizes": SIZES, "counts": BY[by], "block": 1, "validate": 2}
    whole = trained("bamdlm", tmp_path / "a", 6, save_every=3, **given)
    path = str(tmp_path / "a" / "step=3.ckpt")
    resumed = trained("bamdlm", tmp_path / "b", 6, resume=path, **given)
    pairs = zip(resumed.backbone.parameters(), whole.backbone.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert whole.interval == ((1e-3, 1) if by == "times" else (0, 1))  # there is no search


def test_with_several_block_sizes_micro_batches_do_not_change_a_run(tmp_path):
    given = {"eps": 1e-3, "sizes": SIZES, "counts": BY["counts"]}
    runs = [trained("bamdlm", tmp_path, 4, batch_size=size, **given) for size in (8, 2)]
    for ours, theirs in zip(*(m.backbone.parameters() for m in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by", BY)
def test_a_run_of_one_block_size_is_bit_for_bit_that_without_the_setting(by, tmp_path):
    law = BY[by] and within(1, 4, 4)
    plain = trained("bamdlm", tmp_path, 4, counts=law)
    ours = trained("bamdlm", tmp_path, 4, counts=BY[by], sizes=SizeLaw((4,), (1.0,)))
    pairs = zip(ours.backbone.parameters(), plain.backbone.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    others = trained("bamdlm", tmp_path, 4, counts=BY[by], sizes=SIZES)
    gap = others.backbone.output_layer.linear.weight - plain.backbone.output_layer.linear.weight
    assert gap.abs().max() > 1e-3


# blocks of one for two steps, of four for two, then the whole row
GROWS = {0: 1, 2: 4, 4: LENGTH}


@pytest.mark.parametrize("by", BY)
def test_a_resumed_run_whose_blocks_grow_is_bit_for_bit_the_uninterrupted_one(by, tmp_path):
    """With causal clean halves, labels of the next token and an AR loss."""
    given = {"schedule": GROWS, "counts": BY[by], "validate": 2}
    given |= {"adapt": Adaptation(causal=True, shifted=True), "ar_loss": 0.5}
    whole = trained("bamdlm", tmp_path / "a", 6, save_every=3, **given)
    path = str(tmp_path / "a" / "step=3.ckpt")
    resumed = trained("bamdlm", tmp_path / "b", 6, resume=path, **given)
    pairs = zip(resumed.backbone.parameters(), whole.backbone.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("ar_loss", [0.0, 0.5])
def test_where_blocks_grow_micro_batches_do_not_change_a_run(ar_loss, tmp_path):
    given = {"eps": 1e-3, "schedule": GROWS, "counts": BY["counts"], "ar_loss": ar_loss}
    given["adapt"] = Adaptation(causal=True)
    runs = [trained("bamdlm", tmp_path, 5, batch_size=size, **given) for size in (8, 2)]
    for ours, theirs in zip(*(m.backbone.parameters() for m in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert float(runs[0].health.loss) == pytest.approx(float(runs[1].health.loss), rel=1e-4)
    if ar_loss:
        parts = [float(m.health.ar_loss) for m in runs]
        assert parts[0] == pytest.approx(parts[1], rel=1e-4)


@pytest.mark.parametrize("by", BY)
def test_each_stage_of_growing_blocks_is_a_run_at_that_size(by):
    """The same noise, masks and weights of the loss, bit for bit; validation as ever."""
    ids = torch.tensor(MemoryRows(GLOBAL, 3).ids)
    grown = module("bamdlm", schedule=GROWS, counts=BY[by])
    for step, size in ((0, 1), (1, 1), (2, 4), (3, 4), (4, LENGTH), (99, LENGTH)):
        rows = torch.arange(GLOBAL) + step * GLOBAL
        batch = {"input_ids": ids, "row": rows, "attention_mask": ids * 0 + 1}
        plain = module("bamdlm", block=size, counts=BY[by] and within(1, size, size))
        found = []
        for m in (grown, plain):
            seen = []
            m.training_loss = lambda inputs, seen=seen: seen.append(inputs) or torch.zeros(1)
            m.training_step(batch, 0)
            found += seen
        assert found[0].attention_mask == found[1].attention_mask
        for name, value in found[1].tensors().items():
            assert torch.equal(getattr(found[0], name), value), (step, name)
    assert grown.objective.block_size == 4


def test_sizes_follow_steps():
    assert [size_at(GROWS, step) for step in (0, 1, 2, 3, 4, 1000)] == [1, 1, 4, 4, 16, 16]
    assert shares_of_steps(GROWS, 8) == {1: 0.25, 4: 0.25, 16: 0.5}
    assert shares_of_steps({0: 4, 2: 1, 3: 4, 10: 8}, 4) == {1: 0.25, 4: 0.75}


def test_validation_reports_diffusion_alone():
    found = []
    for factor in (0.0, 0.5):
        m = module("bamdlm", adapt=Adaptation(causal=True), ar_loss=factor, validate_by="counts")
        found.append(validated(m).nll)
    assert found[0] == found[1]


def test_validation_is_at_the_block_size_whatever_training_draws(tmp_path):
    found = []
    for sizes in (None, SIZES):
        m = module("bamdlm", sizes=sizes, validate_by="counts")
        trainer(tmp_path, 0, validate=1).validate(m, datamodule=data(4), verbose=False)
        found.append(m.validated.nll)
    assert found[0] == found[1]


@pytest.mark.parametrize(("algo", "law"), COUNTS)
def test_training_by_counts_masks_what_the_law_draws(algo, law):
    """All eight rows of a step at once; a mask in the text is none of them."""
    m = module(algo, counts=law)
    ids = torch.tensor(MemoryRows(GLOBAL, 3).ids)
    ids[1, 5] = MASK
    batch = {"input_ids": ids, "row": torch.arange(GLOBAL), "attention_mask": ids * 0 + 1}
    inputs = m.training_inputs(batch, m.noise(batch, 1, GLOBAL))
    size = m.objective.block_size
    x_t = inputs.tokens[:, :LENGTH]
    masked = ((x_t == MASK) & (ids != MASK)).unflatten(1, (-1, size))
    m_drawn, lowest = masked.sum(-1), 1 + (law.ends[0] * size if not law.reweighted else 0)
    assert not masked[:, 0, 0].any()  # the first token of a row
    assert (m_drawn[:, 1:] >= lowest).all()
    assert (m_drawn >= 1).all()
    assert len(inputs.loss_positions) == int(m_drawn.sum())
    assert m.compute_loss(inputs).mean.isfinite()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_split_into_micro_batches_does_not_change_a_run(algo, tmp_path):
    """Noise and data are functions of the place in the stream. What is left is the order of
    summation. Adam's eps is raised: its first steps amplify rounding where gradients are near 0."""
    one = trained(algo, tmp_path, 4, batch_size=8, eps=1e-3)
    four = trained(algo, tmp_path, 4, batch_size=2, eps=1e-3)
    for ours, theirs in zip(one.backbone.parameters(), four.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def validated(m, **kwargs):
    t = trainer(None, 1, validate=1)
    t.validate(m, datamodule=data(**kwargs), verbose=False)
    return m.validation.likelihood()


def test_validation_uses_the_averaged_weights_and_gives_the_raw_ones_back():
    m = module("ar")
    with torch.no_grad():
        for average in m.ema.shadow.values():
            average.mul_(0.5)
    before = [p.clone() for p in m.backbone.parameters()]
    averaged = validated(m).nll
    assert all(torch.equal(a, b) for a, b in zip(before, m.backbone.parameters(), strict=True))
    m.ema.swap(m.backbone.named_parameters())
    m.ema = None
    assert validated(m).nll == averaged


def test_every_validation_row_counts_once_whatever_the_batches():
    assert validated(module("ar"), valid=10).rows == 10
    assert validated(module("ar"), valid=10).tokens == 10 * (LENGTH - 1)


def test_the_validation_noise_of_a_row_does_not_depend_on_the_batches():
    d = data()
    whole = validated(module("bamdlm"))
    m = module("bamdlm")
    t = trainer(None, 1, validate=1)
    d.eval_batch_size = 3  # batches across the borders of the global batches of 4
    t.validate(m, datamodule=d, verbose=False)
    assert m.validation.likelihood().nll == pytest.approx(whole.nll, rel=1e-5)


def test_blocks_of_one_validate_the_exact_likelihood():
    m = module("bamdlm", block=1, exact=True)
    batch = {"input_ids": torch.tensor(data().valid.ids), "row": torch.arange(10)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    noise = m.noise(batch, 1, 4)
    m.ema = None
    exact = m.eval().compute_loss(m.loss_inputs(batch, EXACT, noise, False))
    expected = float(exact.nll.sum() / exact.loss_mask.sum())
    assert validated(m).nll == pytest.approx(expected, rel=1e-6)


def fitted_with_search(tmp_path, fix):
    m = module("bamdlm", widths=(0.5, 0.75), fix=fix)
    t = trainer(tmp_path, 2, validate=2, callbacks=[saver(tmp_path, 2)])
    t.fit(m, datamodule=data())
    logged = {k: float(v) for k, v in t.callback_metrics.items() if k.startswith("valid_var")}
    return m, logged


def test_the_interval_of_least_variance_becomes_the_training_interval(tmp_path, monkeypatch):
    """Two validations that choose differently, after steps 1 and 2. The checkpoint of step 2 comes
    ahead of the second."""
    m = module("bamdlm", widths=(0.5, 0.75))
    grid = clipping.candidates(4, [0.5, 0.75], 0.25, 1e-3)
    batches, chosen, asked = 3, [grid[3], grid[5]], []  # rows of validation: 10, 4 at a time
    validations = [[float(each != best) for each in grid] * batches for best in chosen]
    variances = iter([each for validation in validations for each in validation])
    monkeypatch.setattr(clipping, "variance", lambda means: torch.tensor(next(variances)).double())
    loss_inputs = m.loss_inputs

    def watched(batch, interval, noise, training):
        asked.extend([interval] * training)
        return loss_inputs(batch, interval, noise, training)

    m.loss_inputs = watched
    t = trainer(tmp_path, 2, validate=2, callbacks=[saver(tmp_path, 2)])
    t.fit(m, datamodule=data())
    assert next(variances, None) is None
    assert asked == [(1e-3, 1)] * 2 + [chosen[0]] * 2  # two micro-batches a step
    logged = {k: float(v) for k, v in t.callback_metrics.items() if k.startswith("valid_var")}
    assert logged == {clipping.name(each): float(each != chosen[1]) for each in grid}
    assert m.interval == chosen[1]
    saved = read_checkpoint(str(next(tmp_path.glob("*.ckpt"))))
    assert saved.interval == pytest.approx(chosen[0], abs=1e-6)


def test_by_counts_the_search_needs_no_pass_of_its_own(tmp_path, monkeypatch):
    """Its figures are those of drawn times, in the mean over a hundred batches."""
    passes, found, compute_loss = [], {}, MaskedDiffusion.compute_loss

    def watched(self, *asked):
        passes.append(torch.is_grad_enabled())
        return compute_loss(self, *asked)

    monkeypatch.setattr(MaskedDiffusion, "compute_loss", watched)
    batches, grid = 100, clipping.candidates(4, [0.5, 0.75], 0.25, 1e-3)
    for measure, expected in (("nelbo", batches * len(grid)), ("counts", batches)):
        m = module("bamdlm", widths=(0.5, 0.75), validate_by=measure)
        t = trainer(tmp_path, 1, validate=2)
        passes.clear()
        t.fit(m, datamodule=data(valid=4 * batches))
        assert passes.count(False) == expected
        values = t.callback_metrics
        found[measure] = [float(values[clipping.name(interval)]) for interval in grid]
    # from 1e-3 on, few draws with weights of up to 1000 make the variance: these are missed
    late = [i for i, (low, _) in enumerate(grid) if low > 0.2]
    ours, published = ([found[name][i] for i in late] for name in ("counts", "nelbo"))
    assert ours == pytest.approx(published, rel=0.1)


def fitted_by_counts(tmp_path, **settings):
    m = module("bamdlm", validate_by="counts", **settings)
    t = trainer(tmp_path, 3, validate=2, callbacks=[saver(tmp_path, 3)])
    t.fit(m, datamodule=data())
    saved = read_checkpoint(str(next(tmp_path.glob("*.ckpt"))))
    return m, {k: float(v) for k, v in t.callback_metrics.items()}, saved


def test_a_law_is_learnt_at_each_validation_from_its_second_moments(tmp_path, monkeypatch):
    """Logged, saved, and used from the next step on; the last validation comes after the save."""
    found = []

    def watched(sums):
        found.append(least_variance(sums))
        return found[-1]

    monkeypatch.setattr(validation, "least_variance", watched)
    m, logged, saved = fitted_by_counts(tmp_path, counts=to_learn(4), learn=True)
    assert len(found) == 3
    assert torch.equal(m.count_law.density, found[-1].density)
    assert torch.equal(saved.raw["count_law"], found[1].density)
    shares = [logged[f"count_law_{i}"] for i in range(1, 5)]
    assert shares == pytest.approx((m.count_law.density / 4).tolist(), rel=1e-6)
    assert saved.interval == (0, 1)


@pytest.mark.parametrize("fix", [False, True])
def test_the_range_of_counts_of_least_variance_becomes_the_training_range(tmp_path, fix):
    m, logged, saved = fitted_by_counts(
        tmp_path, counts=within(1, 4, 4), widths=(0.5, 0.75), fix=fix
    )
    grid = clipping.count_candidates(4, [0.5, 0.75], 0.25)
    figures = {counts: logged[clipping.name_of_counts(counts)] for counts in grid}
    best = (1, 4) if fix else min(figures, key=figures.get)
    assert fix or best != (1, 4)
    assert torch.equal(m.count_law.density, within(*best, 4).density)
    assert (logged["counts_min"], logged["counts_max"]) == best
    low, high = (round(4 * bound) for bound in saved.interval)
    assert torch.equal(saved.raw["count_law"], within(1 + low, high, 4).density)
    resumed = module("bamdlm", counts=within(1, 4, 4))
    resumed.trainer = trainer(None, 1)
    load_state(resumed, saved.raw)
    assert torch.equal(resumed.count_law.density, saved.raw["count_law"])
    assert not resumed.count_law.reweighted


def test_dropout_is_a_function_of_the_place_in_the_stream(monkeypatch):
    m = module("ar", dropout=0.5).train()
    monkeypatch.setattr(m, "log", lambda *args, **kwargs: None)
    batch = {"input_ids": torch.tensor(MemoryRows(4, 3).ids)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    rows = (0, 0, 8)
    losses = [float(m.training_step({**batch, "row": torch.arange(4) + r}, 0)) for r in rows]
    assert losses[0] == losses[1] != losses[2]


def test_without_widths_the_interval_stays_as_it_was_set(tmp_path):
    m = module("bamdlm", interval=(0.3, 0.8))
    trainer(tmp_path, 2, validate=1).fit(m, datamodule=data())
    assert m.interval == (0.3, 0.8)


def test_fixed_clipping_searches_but_keeps_the_interval(tmp_path):
    m, logged = fitted_with_search(tmp_path, fix=True)
    assert logged
    assert m.interval == (1e-3, 1.0)


@pytest.mark.parametrize("algo", ["ar", "bamdlm", "mdlm", "sedd"])
def test_a_checkpoint_has_the_published_layout(algo, tmp_path):
    trained(algo, tmp_path, 2, save_every=2)
    ours = SafeCheckpointIO().load_checkpoint(next(tmp_path.glob("*.ckpt")))
    name = {"bamdlm": "bd3lm_bs4"}.get(algo, algo)
    info = load_json("checkpoints/info.json")[name]
    assert sorted(ours) == sorted(info["top_level_keys"])
    assert list(ours["state_dict"]) == info["state_dict_keys"]
    assert len(ours["ema"]["shadow_params"]) == len(info["ema_order"])
    assert set(ours["ema"]) == {"decay", "num_updates", "shadow_params"}
    theirs = SafeCheckpointIO().load_checkpoint(GOLDEN / "checkpoints" / f"{name}.ckpt")
    for key, value in theirs["state_dict"].items():
        assert ours["state_dict"][key].dtype == value.dtype
        assert ours["state_dict"][key].dim() == value.dim()
    assert ours["loops"].keys() == theirs["loops"].keys()
    assert ours["sampler"]["random_state"].shape == theirs["sampler"]["random_state"].shape


def test_dropout_is_at_work_in_training_only():
    m = module("ar", dropout=0.5)
    batch = {"input_ids": torch.tensor(data().valid.ids), "row": torch.arange(10)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    losses = [
        float(m.train().compute_loss(m.loss_inputs(batch, EXACT, None, True)).mean.detach())
        for _ in range(2)
    ]
    assert losses[0] != losses[1]
    losses = [
        float(m.eval().compute_loss(m.loss_inputs(batch, EXACT, None, True)).mean.detach())
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_token_in_the_text_is_seen_and_not_predicted(algo, training):
    """Tokenizers read the letters "[MASK]" as the mask, whose probability is 0."""
    m = module(algo)
    ids = torch.randint(0, MASK, (GLOBAL, LENGTH), generator=torch.Generator().manual_seed(3))
    ids[1, 5] = ids[2, 9] = MASK
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "row": torch.arange(GLOBAL),
    }
    noise = m.noise(batch, 1, GLOBAL)
    loss = m.compute_loss(m.loss_inputs(batch, (1e-3, 1.0), noise, training))
    assert loss.mean.isfinite()
    first = 0 if algo != "ar" else 1
    assert (loss.loss_mask == 0)[1, 5 - first]
    assert (loss.loss_mask == 0)[2, 9 - first]
    assert (loss.nll[ids[:, first:] == MASK] == 0).all()


BROKEN_LAWS = {
    "none": None,
    "text": "x",
    "of other parts": torch.ones(3).double(),
    "of float32": torch.ones(4),
    "of nan": torch.full((4,), torch.nan).double(),
    "below zero": torch.tensor([-1.0, 1, 2, 2]).double(),
    "of another mean": torch.full((4,), 2.0).double(),
    "with a weight that explodes": torch.tensor([1e-9, 4 / 3, 4 / 3, 4 / 3]).double(),
}


@pytest.mark.parametrize("theirs", BROKEN_LAWS.values(), ids=BROKEN_LAWS)
def test_a_run_by_counts_needs_a_law_in_the_checkpoint(theirs):
    (problem,) = resuming.count_law(theirs, to_learn(4))
    assert "count_law" in problem


def test_a_run_by_counts_goes_on_with_a_law():
    for ours in (to_learn(4), within(2, 3, 4), None):
        density = None if ours is None else ours.density
        assert list(resuming.count_law(density, ours)) == []
