"""The texts that are written side by side: who sits where, what is known of them, what their cache
holds.

A finished text leaves its place to the next request; when no request is left the batch shrinks. All
that decides the course of a text (what it was given, which positions are hidden, how far it is) is
known to the host without asking the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import compiled_sample, fold, row_keys, sample
from .params import SamplingParams
from .replay import Replay
from .request import Frame, Sample, TextRequest
from .stopping import ENTROPY_TOKENS, MOST_TRIES, Stop, find_stop, low_entropy


@dataclass
class Slot:
    """One place of the batch. Positions below `filled` are final; `committed` tokens are in the
    cache.
    """

    request: TextRequest
    total: int  # tokens of the text
    gaps: list[int]  # hidden positions among the given tokens
    key: int  # of its random stream
    tries: int = 1
    filled: int = 0
    committed: int = 0
    nfe: int = 0
    rejected: bool = False

    @property
    def given(self) -> int:
        return len(self.request.tokens)

    def hidden(self, start: int, stop: int) -> list[int]:
        """Positions in start .. stop - 1 that are still to be written."""
        start = max(start, self.filled)
        gaps = [p for p in self.gaps if start <= p < stop]
        return gaps + list(range(max(start, self.given), min(stop, self.total)))

    def next_hidden(self) -> int | None:
        for p in self.gaps:
            if p >= self.filled:
                return p
        tail = max(self.filled, self.given)
        return tail if tail < self.total else None


class ActiveTexts:
    """`x` int64 [B, length + 1]: the texts; writes that concern nobody go to the last column."""

    def __init__(
        self, denoise, requests: Iterator[TextRequest], params: SamplingParams, device, watch, tick
    ):
        self.denoise, self.requests, self.params = denoise, requests, params
        self.mask_id, self.device = denoise.mask_id, device
        self.watch, self.tick = watch, tick
        self.slots: list[Slot] = []
        self.x = torch.empty(0, params.length + 1, dtype=torch.int64, device=device)
        self.cache = None
        cuda = torch.device(device).type == "cuda"
        self.replay = Replay() if cuda and denoise.recordable else None
        compiled = self.replay is not None and denoise.compiled
        self.sample = compiled_sample() if compiled else sample
        self.before: Tensor | None = None  # for who watches: the texts of the last question
        self.evaluations = 0
        first = [r for _, r in zip(range(params.batch_size), requests, strict=False)]
        if first:
            self.x = torch.full((len(first), params.length + 1), self.mask_id, device=device)
            self.slots = [self._seat(i, request, tries=1) for i, request in enumerate(first)]
            self._fresh_cache()

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def dump(self) -> int:
        """The column for writes that concern nobody."""
        return self.params.length

    def tensor(self, values, dtype=torch.int64) -> Tensor:
        """Numbers of the host on the device, without waiting for it."""
        values = torch.as_tensor(values, dtype=dtype)
        if torch.device(self.device).type != "cpu":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def keys(self, slot: Tensor, position: Tensor) -> Tensor:
        """Key of each (slot, position), int64 on the CPU; the two broadcast."""
        return fold(torch.tensor([slot.key for slot in self.slots])[slot], position)

    def ask(self, *question) -> Tensor:
        """The denoiser's answer; counted as one evaluation of the batch."""
        self._count()
        with torch.inference_mode():
            return self.denoise(*question)

    def reveal(self, starts: list[int], width: int, step: Tensor) -> None:
        """Write tokens: step int64 [3, B, R] says where to read in tokens starts[b] .. starts[b] +
        width - 1, where in row b to write, and with which key. With a cache the rows start behind
        what is committed."""
        self._count()
        cache = self.cache
        with torch.inference_mode():
            if self.replay is None:
                self._reveal(self.window(starts, width), step, cache)
            elif cache is None:
                self.replay(
                    None, lambda *q: self._reveal(*q, None), self.window(starts, width), step
                )
            else:
                reach = cache.reach_of(max(slot.committed for slot in self.slots), width)
                self.replay(
                    (reach, width),
                    lambda step, committed: self._reveal(
                        self._behind(committed, width), step, cache.at(committed, reach)
                    ),
                    step,
                    cache.committed,
                )

    def _reveal(self, tokens: Tensor, step: Tensor, cache) -> None:
        read, write, key = step
        log_probs = self.denoise(tokens, read, cache)
        drawn = self.sample(log_probs, key, self.params.nucleus_p, self.params.dtype)
        self.x.scatter_(1, write, drawn)

    def _count(self) -> None:
        """One more evaluation of the batch; who watches will see what it was asked about."""
        self.evaluations += 1
        if self.watch is not None:
            self.before = self._copy()

    def _copy(self) -> Tensor:
        return self.x[:, :-1].to("cpu", copy=True)

    def show(self) -> None:
        if self.watch is not None:
            rows = [slot.request.row for slot in self.slots]
            self.watch(Frame(rows, self.before, self._copy(), self.evaluations))

    # the cache

    def _fresh_cache(self) -> None:
        if self.replay is not None:
            self.replay.forget()
        if self.params.kv_cache:
            self.cache = self.denoise.new_cache(len(self.slots), self.params.context_size)

    def commit(self, tokens: list[int]) -> None:
        """Keep tokens[b] more of what the last pass gave row b."""
        same = len(set(tokens)) == 1
        self.cache = self.cache.commit(tokens[0] if same else self.tensor(tokens))
        for slot, n in zip(self.slots, tokens, strict=True):
            slot.committed += n

    def catch_up(self, targets: list[int], spare: int) -> None:
        """Commit tokens until row b holds targets[b] of them.

        A pass of more tokens than the ring has free would overwrite what other rows still see, so
        it is cut to what every row has room for; `spare` tokens fit always.
        """
        slots = self.params.context_size + self.denoise.block_size
        while True:
            missing = [max(0, t - s.committed) for t, s in zip(targets, self.slots, strict=True)]
            if not any(missing):
                return
            room = slots - max(slot.committed for slot in self.slots)
            size = self.denoise.block_size
            width = min(max(missing), max(spare, room // size * size))
            tokens = self.window([slot.committed for slot in self.slots], width)
            self.ask(tokens, self.tensor([[0]] * len(self)), self.cache)
            self.evaluations -= 1  # it asks nothing
            self.commit([min(n, width) for n in missing])

    # tokens

    def window(self, starts: list[int], width: int) -> Tensor:
        """Tokens starts[b] .. starts[b] + width - 1 of row b, [B, width]; any token past the
        end.
        """
        if len(set(starts)) == 1 and starts[0] + width <= self.x.shape[1]:
            return self.x[:, starts[0] : starts[0] + width]
        return self._behind(self.tensor(starts), width)

    def _behind(self, starts: Tensor, width: int) -> Tensor:
        places = starts[:, None] + torch.arange(width, device=self.device)
        return self.x.gather(1, places.clamp(max=self.x.shape[1] - 1))

    def tails(self, width: int, ends: list[int]) -> list[Tensor]:
        """The last (at most) `width` tokens of the first ends[b] of row b. Waits for the device."""
        starts = [max(0, end - width) for end in ends]
        tails = self.window(starts, max(e - s for e, s in zip(ends, starts, strict=True))).cpu()
        return [t[: e - s] for t, e, s in zip(tails, ends, starts, strict=True)]

    # coming and going

    def _seat(self, i: int, request: TextRequest, tries: int) -> Slot:
        params = self.params
        total = params.length if request.total is None else request.total
        given = len(request.tokens)
        if not 0 < given <= total <= params.length:
            raise ValueError(
                f"row {request.row} is given {given} tokens of a text of {total}, but model.length="
                f"{params.length}: shorten the prompt or set a greater model.length"
            )
        self.x[i] = self.mask_id
        self.x[i, :given] = self.tensor(request.tokens)
        gaps = [p for p, token in enumerate(request.tokens) if token == self.mask_id]
        key = row_keys(params.seed, [request.row], [tries]).item()
        return Slot(request, total, gaps, key, tries)

    def settle(self, fresh: list[int], *, every: bool = False) -> list[Sample]:
        """End of a round: apply the stop rules, hand out the texts that ended and seat new ones.

        fresh[b]: the first position that the rules have not seen yet. They are applied at the new
        length, or with `every` at each length on the way there.
        """
        stops: dict[int, Stop] = {}
        again = []
        if self.params.var_length or self.params.reject_low_entropy:
            ends = [min(slot.filled, slot.total) for slot in self.slots]
            new = max(end - start for end, start in zip(ends, fresh, strict=True))
            for i, tail in enumerate(self.tails(ENTROPY_TOKENS + new, ends)):
                looks = range(fresh[i] + 1, ends[i] + 1) if every else [ends[i]]
                self._judge(i, tail, ends[i], looks, fresh[i], stops, again)
        done = [
            i
            for i, s in enumerate(self.slots)
            if i in stops or (s.next_hidden() is None and i not in again)
        ]
        samples = [self._sample(i, stops.get(i)) for i in done]
        self._turn_over(done, again)
        return samples

    def _judge(self, i, tail, end, looks, fresh, stops, again) -> None:
        slot = self.slots[i]
        if slot.request.total is not None:
            return  # infilling has a fixed length
        if self.params.var_length:
            stop = find_stop(tail, end, looks, fresh, slot.given, self.params.eos_id)
            if stop is not None:
                stops[i] = stop
        elif not slot.rejected and any(
            low_entropy(tail[: look - end + len(tail)]) for look in looks
        ):
            slot.rejected = slot.tries == MOST_TRIES
            if not slot.rejected:
                again.append(i)

    def _sample(self, i: int, stop: Stop | None) -> Sample:
        slot = self.slots[i]
        stop = stop or Stop(slot.total, slot.filled, "length")
        return Sample(
            row=slot.request.row,
            tokens=self.x[i, : stop.length].to("cpu", copy=True),
            nfe=slot.nfe
            - (slot.filled - stop.seen),  # evaluations past the look that ended it do not count
            stopped=stop.reason,
            given=slot.given,
            written=len(slot.gaps) + max(0, stop.length - slot.given),
            tries=slot.tries,
            rejected=slot.rejected,
        )

    def _turn_over(self, done: list[int], again: list[int]) -> None:
        """New requests take the places of the texts that ended; without one the place goes."""
        empty, new = [], list(again)
        for i in again:
            self.slots[i] = self._seat(i, self.slots[i].request, self.slots[i].tries + 1)
        for i in done:
            request = next(self.requests, None)
            if request is None:
                empty.append(i)
            else:
                self.slots[i] = self._seat(i, request, tries=1)
                new.append(i)
        before = len(self)
        if len(new) + len(empty) == before:  # nobody stays
            if empty:
                self.x = self.x[sorted(new)]
                self.slots = [self.slots[i] for i in sorted(new)]
            if self.replay is not None and self.cache is not None and not empty:
                self.cache = self.cache.restarted()  # recordings stay, with all they know
            elif self.slots:
                self._fresh_cache()
            return
        if new and self.cache is not None:
            self.cache = self.cache.reset(
                self.tensor([i in new for i in range(len(self))], torch.bool)
            )
        if empty:
            keep = [i for i in range(len(self)) if i not in empty]
            rows = self.tensor(keep)
            self.x = self.x[rows]
            self.slots = [self.slots[i] for i in keep]
            if self.cache is not None:
                self.cache = self.cache.select(rows)
            if self.replay is not None:
                self.replay.forget()
