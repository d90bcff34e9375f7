"""The order of examples: a function of (seed, examples seen), whatever runs it."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import load_json
from lightning import LightningModule, Trainer
from made_up_split import rows_of_ids

from data.order import ExampleIndex, ShuffledStream, TrainBatches, ValidBatches
from data.packing import RowFormat
from dataloader import DataModule, Examples

LENGTH = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """29 rows; row r holds 10 r, 10 r + 1 ..."""
    how = RowFormat(LENGTH, True, insert_eos=False, insert_special=False, bos=1, eos=2, pad=0)
    ids = [10 * row + column for row in range(29) for column in range(LENGTH)]
    return rows_of_ids(ids, how, 300, tmp_path_factory.mktemp("cache"))


def module(prepared, **settings):
    defaults = {"length": LENGTH, "batch_size": 4, "eval_batch_size": 4, "seed": 5}
    return DataModule(train=prepared, valid=prepared, **(defaults | settings))


def positions(loader, batches):
    return [batch["row"].tolist() for batch in itertools.islice(loader, batches)]


# The stream


def test_every_epoch_shows_every_row_once_in_a_new_order():
    stream = ShuffledStream(rows=11, seed=3)
    epochs = [[stream[p].row for p in range(11 * e, 11 * e + 11)] for e in range(4)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])


def test_the_stream_depends_on_the_seed():
    orders = {tuple(ShuffledStream(50, seed)[p].row for p in range(50)) for seed in range(5)}
    assert len(orders) == 5


def test_the_stream_can_be_read_anywhere():
    stream = ShuffledStream(11, 3)
    ahead = [stream[p] for p in range(60)]
    fresh = ShuffledStream(11, 3)
    assert [fresh[p] for p in (40, 3, 59, 11, 10)] == [ahead[p] for p in (40, 3, 59, 11, 10)]


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="has 0 rows"):
        ShuffledStream(0, 1)


def step_examples(world_size, batch_size, step, global_batch=24, start=0):
    """The examples of one optimizer step, over all ranks and micro-batches."""
    micro = global_batch // (world_size * batch_size)
    found = set()
    for rank in range(world_size):
        stream = ShuffledStream(29, 7)
        batches = iter(TrainBatches(stream, batch_size, rank, world_size, lambda: start))
        own = itertools.islice(batches, step * micro, (step + 1) * micro)
        found |= {index for batch in own for index in batch}
    return found


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 24), (1, 4), (2, 3), (3, 8), (4, 1)])
def test_a_step_has_the_same_examples_on_any_number_of_devices(world_size, batch_size):
    stream = ShuffledStream(29, 7)
    for step in (0, 2):
        expected = {stream[p] for p in range(24 * step, 24 * step + 24)}
        assert step_examples(world_size, batch_size, step) == expected


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 3), (4, 6)])
def test_a_resumed_run_continues_on_other_devices(world_size, batch_size):
    continued = step_examples(world_size, batch_size, step=0, start=48)
    assert continued == step_examples(1, 24, step=2)


def test_ranks_share_no_example():
    stream = ShuffledStream(1000, 0)
    seen = []
    for rank in range(4):
        batches = itertools.islice(TrainBatches(stream, 5, rank, 4, lambda: 0), 10)
        seen += [index.row for batch in batches for index in batch]
    assert len(set(seen)) == len(seen) == 200


# Recorded samplers


@pytest.mark.parametrize(
    "case", load_json("data/samplers.json")["random"], ids=lambda c: str(c["n"])
)
def test_orders_are_permutations_as_recorded_and_a_resumed_epoch_is_its_tail(case):
    """The recorded permutations come from another generator, and there a resumed run gets another
    one (`resume_matches_tail`), which is the fault that this order avoids. What still holds: each
    recorded epoch is a permutation of the rows, as ours is; and ours, resumed where the recording
    was cut, shows the tail."""
    n, cut = case["n"], case["counter_in_state"]
    stream = ShuffledStream(n, case["torch_manual_seed"])
    for epoch, recorded in enumerate(
        (case["epoch1"], case["epoch2"], case["epoch3_head"] + case["epoch3_tail"])
    ):
        ours = [stream[epoch * n + i].row for i in range(n)]
        assert sorted(ours) == list(range(n))
        assert set(ours) == set(recorded)
    resumed = TrainBatches(
        ShuffledStream(n, case["torch_manual_seed"]), 1, 0, 1, start=lambda: 2 * n + cut
    )
    tail = [batch[0].row for batch in itertools.islice(resumed, n - cut)]
    assert tail == [stream[p].row for p in range(2 * n + cut, 3 * n)]


def test_ranks_cover_the_rows_as_recorded():
    """The recorded sampler of two ranks repeats rows until every rank has equally many, or drops
    some; here an epoch's rest is followed by the next epoch, and validation repeats none (and
    refuses fewer rows than ranks)."""
    cases = load_json("data/samplers.json")["distributed"]
    for case in cases:
        n, world = case["n"], case["num_replicas"]
        if n < world:  # recorded: the one row on each rank
            continue
        both = [other for other in cases if settings(other) == settings(case)]
        recorded = [row for other in both for row in other["epoch0"]]
        assert len(recorded) == case["length"] * len(both)
        ours = [
            index.row
            for rank in range(world)
            for batch in ValidBatches(n, 2, rank, world)
            for index in batch
        ]
        assert sorted(ours) == list(range(n))
        assert set(recorded) <= set(ours)


def settings(case):
    return [case[key] for key in ("n", "num_replicas", "drop_last", "shuffle", "seed")]


# Validation


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_shows_every_row_once_and_ranks_have_equally_many_batches(
    world_size, batch_size
):
    for count in range(world_size, 45):
        ranks = [list(ValidBatches(count, batch_size, r, world_size)) for r in range(world_size)]
        seen = [index.row for batches in ranks for batch in batches for index in batch]
        assert sorted(seen) == list(range(count))
        assert len({len(batches) for batches in ranks}) == 1
        assert min(len(batch) for batches in ranks for batch in batches) > 0
        largest = max(len(batch) for batches in ranks for batch in batches)
        assert largest <= max(batch_size, 2 if world_size > 1 else 1)


def test_validation_on_one_device_is_in_order_with_its_last_short_batch():
    batches = list(ValidBatches(10, 4, 0, 1))
    assert [[index.row for index in batch] for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert len(ValidBatches(10, 4, 0, 1)) == 3


def test_fewer_validation_rows_than_devices_are_refused():
    with pytest.raises(ValueError, match="3 rows for 4 devices"):
        ValidBatches(3, 1, 0, 4)


# Loaders


def test_a_batch_holds_rows_their_mask_and_their_positions(prepared):
    batch = next(iter(module(prepared).train_dataloader()))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "input_ids": (torch.int64, (4, LENGTH)),
        "attention_mask": (torch.int64, (4, LENGTH)),
        "row": (torch.int64, (4,)),
    }
    stream = ShuffledStream(len(prepared), 5)
    assert batch["row"].tolist() == [0, 1, 2, 3]
    assert (batch["input_ids"][:, 0] // 10).tolist() == [stream[p].row for p in range(4)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(prepared, workers):
    alone = itertools.islice(module(prepared).train_dataloader(), 12)
    shared = itertools.islice(module(prepared, num_workers=workers).train_dataloader(), 12)
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_validation_reads_every_row_with_workers(prepared):
    loader = module(prepared, num_workers=2).val_dataloader()
    for _ in range(2):  # the workers persist
        seen = torch.cat([batch["row"] for batch in loader])
        assert seen.tolist() == list(range(len(prepared)))


def test_a_loader_starts_where_it_is_told(prepared):
    data = module(prepared)
    data.start_at(40)
    assert positions(data.train_dataloader(), 2) == [[40, 41, 42, 43], [44, 45, 46, 47]]


class Recorder(LightningModule):
    """Trains one number and notes which examples each step saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        self.seen += batch["row"].tolist()
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, _):
        self.validated += batch["row"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, **settings):
    recorder = Recorder()
    resume = settings.pop("ckpt_path", None)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            **settings,
        }
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=resume)
    return recorder, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_sees_each_example_once(prepared, tmp_path, workers):
    """Workers fetch ahead; what they fetched and nobody trained on is shown after the resume."""
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    first, trainer = fit(module(prepared, num_workers=workers), tmp_path, max_steps=3, **options)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = fit(
        module(prepared, num_workers=workers),
        tmp_path,
        max_steps=5,
        ckpt_path=tmp_path / "a.ckpt",
        **options,
    )
    assert first.seen == list(range(24))
    assert second.seen == list(range(24, 40))


def test_a_short_epoch_does_not_show_its_examples_again(prepared, tmp_path):
    recorder, _ = fit(module(prepared), tmp_path, max_epochs=3, limit_train_batches=2)
    assert recorder.seen == list(range(24))
    assert recorder.validated == list(range(len(prepared))) * 3


# Windows of longer rows (text8-crop)


@pytest.fixture(scope="module")
def windows(prepared):
    return Examples(prepared, window=LENGTH // 2, seed=4)


def test_a_window_lies_inside_its_row_and_starts_in_the_first_half(windows, prepared):
    indices = [ExampleIndex(p, p % 29) for p in range(600)]
    batch = windows.__getitems__(indices)
    starts = batch["input_ids"][:, 0] % 10
    expected = starts[:, None] + torch.arange(LENGTH // 2)
    rows_of = torch.tensor([index.row for index in indices])
    torch.testing.assert_close(batch["input_ids"], expected + 10 * rows_of[:, None])
    counts = np.bincount(starts.numpy(), minlength=3)
    assert len(counts) == 3
    assert abs(counts / 600 - 1 / 3).max() < 0.07


def test_a_window_depends_on_seed_and_position_only(windows, prepared):
    indices = [ExampleIndex(p, p % 29) for p in range(60)]
    whole = windows.__getitems__(indices)["input_ids"]
    one_by_one = [windows.__getitems__([index])["input_ids"] for index in indices]
    assert torch.equal(torch.cat(one_by_one), whole)
    other = Examples(prepared, window=LENGTH // 2, seed=5).__getitems__(indices)["input_ids"]
    assert not torch.equal(other, whole)


def test_a_window_begins_with_bos_where_chunks_do(prepared):
    data = module(prepared, length=LENGTH // 2, window_bos=7)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, LENGTH // 2)
    assert (batch["input_ids"][:, 0] == 7).all()
    assert batch["attention_mask"].all()


def test_the_last_target_of_a_window_is_eos_where_ar_predicts_it(prepared):
    data = module(prepared, length=LENGTH // 2 + 1, window_bos=7, window_eos=8)
    ids = next(iter(data.train_dataloader()))["input_ids"]
    assert (ids[:, 0] == 7).all()
    assert (ids[:, -1] == 8).all()
    assert (ids[:, 2:-1] == ids[:, 1:-2] + 1).all()


def test_prepared_rows_travel_to_workers_as_a_path(prepared):
    import pickle

    packed = pickle.dumps(prepared)
    assert len(packed) < 2000
    np.testing.assert_array_equal(pickle.loads(packed).ids, prepared.ids)
    assert json.loads((prepared.folder / "about.json").read_text()) == prepared.about
