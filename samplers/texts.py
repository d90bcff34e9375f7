"""The texts that are written side by side: which request sits where, and what is known of it.

A finished text leaves its place to the next request; when none is left the batch shrinks. All that
decides the course of a text is known to the host without asking the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .canvas import Canvas
from .draw import fold, row_keys
from .params import SamplingParams
from .request import Sample, TextRequest
from .sending import to_device
from .stopping import ENTROPY_TOKENS, MOST_TRIES, Stop, find_stop, low_entropy

AGAIN = 1 << 40  # streams of a position that is filled once more: behind those of all positions


@dataclass
class Slot:
    """What is known of one text of the batch. Positions below `filled` are final."""

    request: TextRequest
    total: int  # tokens of the text
    gaps: list[int]  # masked positions among the given tokens
    key: int  # of its random stream
    tries: int = 1
    filled: int = 0
    looked: int = 0  # its length when the stop rules last looked
    nfe: int = 0
    rejected: bool = False

    @property
    def given(self) -> int:
        return len(self.request.tokens)

    def masked(self, start: int, stop: int) -> list[int]:
        """Positions in start .. stop - 1 that are still to be written."""
        start = max(start, self.filled)
        gaps = [p for p in self.gaps if start <= p < stop]
        return gaps + list(range(max(start, self.given), min(stop, self.total)))

    def next_masked(self) -> int | None:
        return next(iter(self.masked(0, self.total)), None)


class ActiveTexts:
    """Slot b is written in row b of the canvas."""

    def __init__(
        self, denoise, requests: Iterator[TextRequest], params: SamplingParams, device, watch
    ):
        self.requests, self.params = requests, params
        first = list(islice(requests, params.batch_size))
        self.canvas = Canvas(denoise, params, len(first), device, watch)
        self.slots = [self._seat(i, request, tries=1) for i, request in enumerate(first)]

    def __len__(self) -> int:
        return len(self.slots)

    def keys(self, slot: Tensor, position: Tensor, again: bool = False) -> Tensor:
        """Key of each (slot, position), int64 on the CPU; the two broadcast. again: for what a
        corrector fills once more."""
        key = torch.tensor([slot.key for slot in self.slots])[slot]
        return fold(key, position + (AGAIN if again else 0))

    def show(self) -> None:
        """To who watches, after an evaluation."""
        self.canvas.show([slot.request.row for slot in self.slots])

    def _seat(self, i: int, request: TextRequest, tries: int) -> Slot:
        params = self.params
        total = params.length if request.total is None else request.total
        given = len(request.tokens)
        if not 0 < given <= total <= params.length:
            raise ValueError(
                f"row {request.row} is given {given} tokens of a text of {total}, but model.length="
                f"{params.length}: shorten the prompt or set a greater model.length"
            )
        row, mask_id = self.canvas.x[i], self.canvas.mask_id
        row.fill_(mask_id)
        row[:given] = to_device(request.tokens, row.device)
        gaps = [p for p, token in enumerate(request.tokens) if token == mask_id]
        if self.canvas.shifted and gaps[:1] == [0]:
            raise ValueError(
                f"row {request.row}: the prompt begins with a mask token, and this network predicts"
                " a token at the one before it (adapt.label=next): begin the prompt with BOS"
            )
        key = row_keys(params.seed, [request.row], [tries]).item()
        return Slot(request, total, gaps, key, tries)

    def settle(self, *, every: bool) -> list[Sample]:
        """End of a round: apply the stop rules, hand out the texts that ended and seat new ones.
        The rules are applied at the new length, or with `every` at each length on the way there."""
        stops: dict[int, Stop] = {}
        again = []  # texts to be written once more
        if self.params.var_length or self.params.reject_low_entropy:
            ends = [min(slot.filled, slot.total) for slot in self.slots]
            new = max(end - slot.looked for end, slot in zip(ends, self.slots, strict=True))
            for i, tail in enumerate(self.canvas.tails(ENTROPY_TOKENS + new, ends)):
                slot, end, fresh = self.slots[i], ends[i], self.slots[i].looked
                looks = range(fresh + 1, end + 1) if every else [end]
                slot.looked = end
                if slot.request.total is not None:
                    continue  # infilling has a fixed length
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
        done = [
            i
            for i, s in enumerate(self.slots)
            if i in stops or (s.next_masked() is None and i not in again)
        ]
        if done:
            self.canvas.check()
        samples = [self._sample(i, stops.get(i)) for i in done]
        self._turn_over(done, again)
        return samples

    def _sample(self, i: int, stop: Stop | None) -> Sample:
        slot = self.slots[i]
        stop = stop or Stop(slot.total, slot.filled, "length")
        return Sample(
            row=slot.request.row,
            tokens=self.canvas.x[i, : stop.length].to("cpu", copy=True),
            nfe=slot.nfe - (slot.filled - stop.seen),  # without those past the look that ended it
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
        self.slots = [slot for i, slot in enumerate(self.slots) if i not in empty]
        self.canvas.turn_over(new, empty)
