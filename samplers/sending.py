"""Numbers that go from a device to the host or back, which is not kept waiting for them."""

from collections import deque

import torch
from torch import Tensor

AHEAD = 1  # evaluations that may be queued behind the last one whose numbers have arrived


class Here:
    """The event of a CPU tensor: its numbers are already there."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def send(numbers: Tensor) -> tuple[torch.Event | Here, Tensor]:
    """(event, the numbers on the host once the event is reached)."""
    if numbers.device.type == "cpu":
        return Here(), numbers
    arriving = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    arriving.copy_(numbers, non_blocking=True)
    event = torch.Event(numbers.device)
    event.record(torch.accelerator.current_stream(numbers.device))
    return event, arriving


def to_device(values, device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host as a tensor there."""
    values = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Countdown:
    """Masked positions of each row after 0, 1, 2 … evaluations, where the device may be the only
    one to know how many an evaluation reveals. To ask for that number would empty the device's
    queue. So it is sent behind the work that makes it, and until it has arrived a bound holds: an
    evaluation reveals at least one position of every row that has any."""

    def __init__(self, left: list[int]):
        self.known = [left]
        self.coming = deque()

    def send(self, left: Tensor) -> None:
        """After each evaluation, int64 [B]; on the CPU where the host knows what it reveals."""
        self.coming.append(send(left))

    def most(self) -> int:
        """No row has more left. Numbers older than AHEAD evaluations are waited for: what is queued
        behind them keeps the device busy meanwhile."""
        self._collect()
        return max(0, max(self.known[-1]) - len(self.coming))

    def evaluations(self) -> list[int]:
        """How many each row was asked in, at the end."""
        return [sum(n > 0 for n in row) for row in zip(*self.known, strict=True)]

    def _collect(self) -> None:
        while self.coming:
            event, numbers = self.coming[0]
            if not event.query():
                if len(self.coming) <= AHEAD:
                    return
                event.synchronize()
            self.known.append(numbers.tolist())
            for row, (before, after) in enumerate(zip(*self.known[-2:], strict=True)):
                if after >= before > 0:
                    raise ValueError(
                        f"the step rule revealed no token of row {row} in evaluation"
                        f" {len(self.known) - 2}: reveal at least one while any is masked"
                    )
            self.coming.popleft()
