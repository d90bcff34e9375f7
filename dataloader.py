"""Load -> detokenize -> tokenize -> wrap -> save -> batches.

get_rows prepares one split of a corpus, once: the result lies under data.cache_dir in a folder
named by a hash of every setting that shapes it. DataModule serves prepared rows to Lightning.

A batch is {"input_ids" int64 [B, L], "attention_mask" int64 [B, L], "row" int64 [B]}, with
data.pack=documents also "segments" int64 [B, L] (packing.segments). In training "row" is the
example's position in the endless stream of the run (data_order.py): position // global batch size
is the optimizer step, the remainder the row of the global batch. In validation it is the row of the
split.
"""

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

import mirror
import preparation
import signals
from data_order import Place, ShuffledStream, TrainBatches, ValidBatches
from randomness import uniform
from rows import Rows
from splits import Split


def get_rows(
    corpus: str, split: str, *, cache_dir: str | Path, processes: int = 1, **settings
) -> Rows:
    """The rows of one split, prepared at the first call; settings: of splits.Split.

    cache_dir: a folder, or a URL, of which a copy is kept here (mirror.py). processes: that
    tokenize; they do not change the rows. Safe when several processes ask at once: one prepares,
    the others wait.
    """
    wanted, cache = Split(corpus, split, **settings), mirror.local(cache_dir)
    return preparation.prepare(
        cache / "rows" / wanted.folder_name,
        lambda: wanted.pieces(cache),
        wanted.encode,
        wanted.shape,
        wanted.tokenizer.vocab_size,
        wanted.about,
        processes=processes,
        remote=f"{str(cache_dir).rstrip('/')}/rows/{wanted.folder_name}"
        if mirror.is_url(cache_dir)
        else None,
    )


class Examples(Dataset):
    """Whole batches: the places that a batch sampler chose -> tensors."""

    def __init__(
        self, rows: Rows, *, window: int | None = None, bos: int | None = None, seed: int = 0
    ):
        """window: serve that many ids of each row, from a start in its first half that depends on
        seed and position; bos: written over a window's first id."""
        self.rows, self.window, self.bos, self.seed = rows, window, bos, seed

    def __getitems__(self, places: list[Place]) -> dict[str, torch.Tensor]:
        positions = torch.tensor([place.position for place in places])
        ids, mask = map(torch.from_numpy, self.rows.read([place.row for place in places]))
        if self.window is not None:
            draws = uniform(self.seed, positions, dtype=torch.float64)  # [B]
            starts = (draws * (self.rows.length // 2)).long()
            columns = starts[:, None] + torch.arange(self.window)  # [B, L]
            ids, mask = ids.gather(1, columns), mask.gather(1, columns)
            if self.bos is not None:
                ids[:, 0] = self.bos
        batch = {"input_ids": ids, "attention_mask": mask, "row": positions}
        if self.rows.apart:
            batch["segments"] = torch.from_numpy(self.rows.segments([p.row for p in places]))
        return batch


class DataModule(LightningDataModule):
    """Prepared rows as loaders. Set Trainer(use_distributed_sampler=False): the samplers here know
    their rank.

    The position in the stream is the number of examples trained on, optimizer steps times the
    global batch, so that what workers fetched ahead does not count. Checkpoints hold it
    (diffusion.py), and a resumed run sets it with `start_at`.
    """

    def __init__(
        self,
        *,
        train: Rows | None,
        valid: Rows | None,
        length: int,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 1,
        window_bos: int | None = None,
    ):
        """batch_size: of one device and one micro-batch. window_bos: the BOS id where training rows
        are longer than length and data.insert_train_special is set (text8-crop)."""
        super().__init__()
        self.train, self.valid = train, valid
        self.length = length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.seed = seed
        self.window_bos = window_bos
        self.resumed_examples, self.resumed_step = 0, 0

    @property
    def examples_seen(self) -> int:
        """Trained on since the run began, over all devices."""
        if self.trainer is None:
            return self.resumed_examples
        step_examples = (
            self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        )
        return (
            self.resumed_examples + (self.trainer.global_step - self.resumed_step) * step_examples
        )

    def start_at(self, examples_seen: int, step: int = 0) -> None:
        """Continue the stream there; step is the trainer's global_step at that point."""
        self.resumed_examples, self.resumed_step = examples_seen, step

    def train_dataloader(self) -> DataLoader:
        windows = self.train.length != self.length
        examples = Examples(
            self.train,
            window=self.length if windows else None,
            bos=self.window_bos if windows else None,
            seed=self.seed,
        )
        stream = ShuffledStream(len(self.train), self.seed)
        return self.loader(
            examples,
            TrainBatches(stream, self.batch_size, *self.place, lambda: self.examples_seen),
        )

    def val_dataloader(self) -> DataLoader:
        batches = ValidBatches(len(self.valid), self.eval_batch_size, *self.place)
        return self.loader(Examples(self.valid), batches)

    def on_exception(self, exception: BaseException) -> None:
        """Lets the workers end. Lightning tears down the loop at hand alone: after a validation the
        workers of training would be left, and the process would wait for them at its end."""
        self.trainer.fit_loop.teardown()

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world size)"""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def loader(self, examples: Examples, batches) -> DataLoader:
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            worker_init_fn=_deaf,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )


def _deaf(worker: int) -> None:
    """A signal to the whole job must not end the workers while the last steps are made."""
    signals.ignore()


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
