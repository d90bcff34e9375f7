"""Load -> detokenize -> tokenize -> wrap -> save -> batches.

DataModule serves the rows of prepared splits to Lightning. They are kept under data.cache_dir, in a
folder whose name holds a hash of every setting that shapes them.

A batch is {"input_ids" int64 [B, L], "attention_mask" int64 [B, L], "row" int64 [B]}; where
documents are apart also "document_ids" int64 [B, L] (data/packing.py). The mask is 1 where a token
may enter the loss: not in padding and, of conversations, in answers alone. In training "row" is the
example's position in the endless stream of the run (data/order.py): position // global batch size
is the optimizer step, the remainder the row of the global batch. In validation it is the row of the
split.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

import random_streams
from data import packing, streaming
from data.order import ExampleIndex, InOrder, ShuffledStream, TrainBatches, ValidBatches
from data.streaming import StreamedText
from data.token_rows import TokenRows
from models.randomness import uniform
from training.loading import Loader, prepare_worker
from utils import end_children, shown

log = logging.getLogger("bamdlm")

BOOKMARK_EVERY = 32  # batches


class Examples(Dataset):
    """Whole batches: the examples that a batch sampler chose -> tensors."""

    def __init__(
        self,
        rows: TokenRows,
        *,
        window: int | None = None,
        bos: int | None = None,
        eos: int | None = None,
        seed: int = 0,
    ):
        """window: serve that many ids of each row, from a start in its first half that depends on
        seed and position; bos, eos: written over a window's first and last id."""
        self.rows, self.window, self.seed = rows, window, seed
        self.bos, self.eos = bos, eos

    def __getitems__(self, indices: list[ExampleIndex]) -> dict[str, torch.Tensor]:
        positions = torch.tensor([index.position for index in indices])
        rows = [index.row for index in indices]
        ids, mask = map(torch.from_numpy, self.rows.read(rows))
        if self.window is not None:
            seed = random_streams.key(self.seed, "windows")
            shares = uniform(seed, positions, dtype=torch.float64)  # [B]
            starts = (shares * (self.rows.length // 2)).long()
            columns = starts[:, None] + torch.arange(self.window)  # [B, L]
            ids, mask = ids.gather(1, columns), mask.gather(1, columns)
            if self.bos is not None:
                ids[:, 0] = self.bos
            if self.eos is not None:
                ids[:, -1] = self.eos
        batch = {"input_ids": ids, "attention_mask": mask, "row": positions}
        if self.rows.apart:
            batch["document_ids"] = torch.from_numpy(self.rows.document_ids(rows))
        return batch


class StreamedExamples(Dataset):
    """Whole batches straight from the text. The process that asks reads the text forwards.

    When an earlier batch is asked for, it reads again from a bookmark. This happens at a new epoch,
    when workers had fetched batches ahead. Some batches hold a "bookmark", which says where to read
    on (streaming.to_text), as the bytes of a tensor. When the text cannot be read, the batch is
    {"error": why}: an exception would leave a worker as a traceback.
    """

    def __init__(
        self,
        text: StreamedText,
        seed: int,
        rank: int,
        world_size: int,
        bookmarks: Callable[[], list[str]],
        resumed: Callable[[], int],
    ):
        """bookmarks, resumed: of the run that goes on, and how many examples it has seen."""
        self.text, self.seed, self.resumed = text, seed, resumed
        self.lanes, self.bookmarks = streaming.lanes_of(rank, world_size), bookmarks
        self.fingerprint = text.fingerprint(seed)
        self.stream: streaming.Stream | None = None
        self.next = 0  # no position before it is asked for without going back
        self.batches = 0
        self.own: deque[tuple[int, dict]] = deque(maxlen=4)  # (position, bookmarks made there)

    def open(self, position: int) -> streaming.Stream:
        bookmarks = next((marks for at, marks in reversed(self.own) if at <= position), None)
        if bookmarks is None:
            bookmarks = streaming.from_texts(self.bookmarks(), self.fingerprint)
        if self.resumed() and not bookmarks:
            log.info("no bookmark: tokenizing the text up to example %s again", f"{position:,}")
        return streaming.Stream(self.text, self.seed, lanes=self.lanes, bookmarks=bookmarks)

    def __getitems__(self, indices: list[ExampleIndex]) -> dict:
        positions = [index.position for index in indices]
        try:
            if self.stream is None or positions[0] < self.next:
                self.stream = self.open(positions[0])
            rows = self.stream.read(positions)
            self.next = positions[-1] + 1
        except streaming.TextError as error:
            return {"error": shown(error)}
        length = rows.ids.shape[1]
        mask = np.arange(length) < rows.counts[:, None]
        batch = {"row": torch.tensor(positions)}
        if rows.marks is not None:
            batch["document_ids"] = torch.from_numpy(packing.document_ids(rows.marks, length))
            mask = packing.scored(rows.marks, length)
        batch["input_ids"] = torch.from_numpy(rows.ids)
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.batches % BOOKMARK_EVERY == 0:
            self.own.append((self.next, self.stream.bookmarks()))
            text = streaming.to_text(self.stream.bookmarks(), self.fingerprint)
            batch["bookmark"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.batches += 1
        return batch


class DataModule(LightningDataModule):
    """The loaders of training and validation. Set Trainer(use_distributed_sampler=False): the
    samplers here know their rank.

    The position in the stream is the number of examples trained on: optimizer steps times the
    global batch. Batches that workers fetched ahead do not count. Checkpoints hold the position
    (diffusion.py), and a resumed run sets it with `start_at`.
    """

    def __init__(
        self,
        *,
        train: TokenRows | StreamedText | None,
        valid: TokenRows | None,
        length: int,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int = 0,
        seed: int = 1,
        window_bos: int | None = None,
        window_eos: int | None = None,
    ):
        """batch_size: of one device and one micro-batch. window_bos, window_eos: ids that begin and
        end a window where training rows are longer than length (text8-crop)."""
        super().__init__()
        self.train, self.valid = train, valid
        self.length = length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.window_bos, self.window_eos = window_bos, window_eos
        self.resumed_examples, self.resumed_step = 0, 0
        self.bookmark: str | None = None  # of the text streamed, at a batch that was trained on
        self.resumed_bookmarks: list[str] = []  # of all devices

    @property
    def examples_seen(self) -> int:
        """Trained on since the run began, over all devices."""
        if self.trainer is None:
            return self.resumed_examples
        trainer, steps = self.trainer, self.trainer.global_step - self.resumed_step
        at_once = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        return self.resumed_examples + steps * at_once

    def start_at(self, examples_seen: int, step: int = 0) -> None:
        """Continue the stream there; step is the trainer's global_step at that point."""
        self.resumed_examples, self.resumed_step = examples_seen, step

    def train_dataloader(self) -> DataLoader:
        streams = isinstance(self.train, StreamedText)
        if streams:
            examples = StreamedExamples(
                self.train,
                self.seed,
                *self.rank_and_size,
                lambda: self.resumed_bookmarks,
                lambda: self.resumed_examples,
            )
        else:
            examples = Examples(
                self.train,
                window=None if self.train.length == self.length else self.length,
                bos=self.window_bos,
                eos=self.window_eos,
                seed=self.seed,
            )
        batches = TrainBatches(
            InOrder() if streams else ShuffledStream(len(self.train), self.seed),
            self.batch_size,
            *self.rank_and_size,
            lambda: self.examples_seen,
            in_turn=streams,
        )
        # one process reads a text for a device: it tokenizes several times as fast as a GPU trains
        workers = min(1, self.num_workers) if streams else self.num_workers
        return self.loader(examples, batches, workers)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Called with each batch when its turn comes, not when it is fetched."""
        if "error" in batch:
            raise streaming.TextError(batch["error"])
        if "bookmark" in batch:
            self.bookmark = batch.pop("bookmark").numpy().tobytes().decode()
        return batch

    def state_dict(self) -> dict:
        """Of a streamed text: the bookmarks of all devices. Every rank must call it."""
        if not isinstance(self.train, StreamedText):
            return {}
        of_all = [self.bookmark]
        if torch.distributed.is_initialized():
            of_all = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(of_all, self.bookmark)
        if None in of_all:  # nothing was trained on since the run went on
            return {"bookmarks": self.resumed_bookmarks}
        return {"bookmarks": of_all}

    def load_state_dict(self, state: dict) -> None:
        self.resumed_bookmarks = state["bookmarks"]

    def val_dataloader(self) -> DataLoader:
        batches = ValidBatches(len(self.valid), self.eval_batch_size, *self.rank_and_size)
        return self.loader(Examples(self.valid), batches, self.num_workers)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning ends only the workers of the loop that runs: after an error in validation the
        process would wait for those of training for ever."""
        end_children()

    @property
    def rank_and_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def loader(self, examples: Dataset, batches: Iterable, workers: int) -> DataLoader:
        return Loader(
            examples,
            batch_sampler=batches,
            collate_fn=dict,  # the examples are batches already
            worker_init_fn=prepare_worker,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
