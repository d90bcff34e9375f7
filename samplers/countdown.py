"""How many positions are still masked, where only the device knows: read when the numbers arrive.

A rule that looks at the network decides on the device how many positions it reveals. To ask for
that number would empty the device's queue before every evaluation. So it is sent to pinned memory
behind the work that makes it, and the host looks whether it is there. Until it is, a bound holds:
an evaluation reveals at least one position of every row that has any.
"""

from collections import deque

from torch import Tensor

from .sending import send

AHEAD = 1  # evaluations that may be queued behind the last one whose numbers have arrived


class Countdown:
    """Masked positions of each row after 0, 1, 2 … evaluations."""

    def __init__(self, left: list[int]):
        self.known = [left]
        self.coming = deque()

    def tell(self, left: list[int]) -> None:
        """After an evaluation of which the host knows what it reveals."""
        self.known.append(left)

    def send(self, left: Tensor) -> None:
        """After an evaluation of which only the device knows it, int64 [B]."""
        self.coming.append(send(left))

    def most(self) -> int:
        """No row has more left. Numbers older than AHEAD evaluations are waited for: what is queued
        behind them keeps the device busy meanwhile."""
        self._collect()
        return max(0, max(self.known[-1]) - len(self.coming))

    def shown(self, before: int) -> int:
        """No row had more revealed by the last evaluation. before: what `most` was ahead of it."""
        self._collect()
        if self.coming:
            return before
        return max(a - b for a, b in zip(*self.known[-2:], strict=True))

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
            self.coming.popleft()
