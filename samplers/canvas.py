"""The tokens that are written side by side, and the network that is asked about them.

`x` int64 [B, length + 1] holds the texts. The cache, its recordings and what is committed to it
follow the rows when they come and go.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from models.compiling import compiled, compiling, keep_signal

from .draw import compiled_sample, sample
from .params import SamplingParams
from .request import Frame
from .sending import to_device


class Canvas:
    def __init__(self, denoise, params: SamplingParams, rows: int, device, watch):
        self.denoise, self.params, self.device = denoise, params, device
        self.mask_id, self.watch = denoise.mask_id, watch
        # a function that stands for the network in a test need not say so
        self.shifted = getattr(denoise, "shifted", False)
        least = 2 * params.block_size  # tokens: a block and the token before it
        if self.shifted and params.context_size < min(least, params.length):
            raise ValueError(
                f"sampling.context_size={params.context_size}: this network predicts the first"
                " token of a block at the one before it (adapt.label=next), so it must see two"
                f" blocks: at least {least}"
            )
        self.dump = params.length  # the column for writes that concern nobody
        self.x = torch.full((rows, params.length + 1), self.mask_id, device=device)
        # the log-probability of each token when it was drawn, for a corrector and who watches
        wanted = params.corrector or watch is not None
        self.sure = torch.full(self.x.shape, torch.nan, device=device) if wanted else None
        self.cache = None
        self.committed = [0] * rows  # tokens of each row that the cache holds for good
        cuda = torch.device(device).type == "cuda"
        self.replay = Replay() if cuda and denoise.recordable else None
        self.compiled = self.replay is not None and denoise.compiled
        self.sample = compiled_sample() if self.compiled else sample
        # NaN once an answer was no number; looked at with finished texts, as the host waits then
        self.sum = torch.zeros((), device=device)
        self.before: Tensor | None = None  # for who watches: the texts before the last evaluation
        self.evaluations = 0
        if rows:
            self._fresh_cache()

    def __len__(self) -> int:
        return len(self.committed)

    def ask(self, *arguments) -> Tensor:
        """The denoiser's answer; counted as one evaluation of the batch."""
        self._count()
        with torch.inference_mode():
            return self.answer(*arguments)

    def answer(self, *arguments) -> Tensor:
        """The same [..., V], inside of `evaluate`. In every row NaN comes alone or not at all, but
        for the mask token."""
        found = self.denoise(*arguments)
        add = compiled(_add_sum) if self.compiled else _add_sum
        with compiling(self.compiled):
            add(self.sum, found, 0 if self.mask_id else 1)
        return found

    def check(self) -> None:
        """FloatingPointError where the network did not answer with numbers. Waits for the
        device."""
        if self.sum.isnan().item():
            raise FloatingPointError(
                "the network answered NaN, which is no probability: its weights are damaged, or"
                " too large for its precision; no text of this batch is kept"
            )

    def evaluate(
        self, name: Hashable, function: Callable, starts: list[int], width: int, *numbers: Tensor
    ) -> Tensor | None:
        """function(tokens starts[b] .. starts[b] + width - 1 of each row, cache, *numbers), which
        asks the network once; recorded where that is possible. Under one name the function is the
        same. With a cache the rows start behind what is committed."""
        self._count()
        cache = self.cache
        with torch.inference_mode():
            if self.replay is None:
                return function(self.window(starts, width), cache, *numbers)
            if cache is None:
                tokens = self.window(starts, width)
                return self.replay(name, lambda x, *n: function(x, None, *n), tokens, *numbers)
            reach = cache.reach_of(max(self.committed), width)

            def behind(committed: Tensor, *numbers: Tensor) -> Tensor | None:
                tokens = self._behind(committed, width)
                return function(tokens, cache.at(committed, reach), *numbers)

            return self.replay((name, reach, width), behind, cache.committed, *numbers)

    def reveal(self, starts: list[int], width: int, step: Tensor) -> None:
        """Write tokens: step int64 [3, B, R] says where to read in tokens starts[b] .. starts[b] +
        width - 1, where in row b to write, and with which key."""
        self.evaluate("reveal", self._reveal, starts, width, step)

    def _reveal(self, tokens: Tensor, cache, step: Tensor) -> None:
        read, write, key = step
        log_probs = self.answer(tokens, read, cache)
        with compiling(self.compiled):
            drawn = self.sample(log_probs, key, self.params.warp, self.params.dtype)
        self.write(write, drawn, log_probs)

    def write(
        self, where: Tensor, tokens: Tensor, log_probs: Tensor, read: Tensor | None = None
    ) -> None:
        """tokens [B, P] to where [B, P]; they were drawn at places read [B, P] of log_probs [B, R,
        V], None: at all R."""
        self.x.scatter_(1, where, tokens)
        if self.sure is not None:
            places, vocabulary = log_probs.shape[1:]
            read = torch.arange(places, device=self.device) if read is None else read
            sure = log_probs.flatten(1).gather(1, read * vocabulary + tokens)
            self.sure.scatter_(1, where, sure.to(self.sure.dtype))

    def _count(self) -> None:
        """One more evaluation of the batch; who watches will see what it was asked about."""
        keep_signal()
        self.evaluations += 1
        if self.watch is not None:
            self.before = self._copy(self.x)

    def _copy(self, numbers: Tensor) -> Tensor:
        return numbers[:, :-1].to("cpu", copy=True)

    def show(self, names: list[int]) -> None:
        """Let who watches see what was written; names: the row number of each text."""
        if self.watch is not None:
            tokens, sure = self._copy(self.x), self._copy(self.sure)
            self.watch(Frame(names, self.before, tokens, self.evaluations, sure))

    def _fresh_cache(self) -> None:
        if self.replay is not None:
            self.replay.forget()
        if self.params.kv_cache:
            size = self.denoise.block_size
            blocks = -(-self.params.context_size // size)  # rounded up, where a text fits into it
            self.cache = self.denoise.new_cache(len(self), blocks * size)

    def commit(self, tokens: list[int]) -> None:
        """Keep tokens[b] more of what the last pass gave row b."""
        same = len(set(tokens)) == 1
        self.cache = self.cache.commit(tokens[0] if same else to_device(tokens, self.device))
        self.committed = [c + n for c, n in zip(self.committed, tokens, strict=True)]

    def catch_up(self, targets: list[int], spare: int) -> None:
        """Commit tokens until row b holds targets[b] of them.

        A pass of more tokens than the ring has free would overwrite what other rows still see, so
        it is cut to what every row has room for; `spare` tokens fit always.
        """
        size = self.denoise.block_size
        while True:
            missing = [max(0, t - c) for t, c in zip(targets, self.committed, strict=True)]
            if not any(missing):
                return
            room = self.params.context_size + size - max(self.committed)
            width = min(max(missing), max(spare, room // size * size))
            tokens = self.window(self.committed, width)
            self.ask(tokens, to_device([[0]] * len(self), self.device), self.cache)
            self.evaluations -= 1  # it asks nothing
            self.commit([min(n, width) for n in missing])

    def turn_over(self, new: list[int], empty: list[int]) -> None:
        """Rows `new` hold other texts from now on, rows `empty` are taken away."""
        before = len(self)
        for row in new:
            self.committed[row] = 0
        keep = [row for row in range(before) if row not in empty]
        self.committed = [self.committed[row] for row in keep]
        if len(new) + len(empty) == before:  # nobody stays
            if empty:
                self._keep(keep)
            if self.replay is not None and self.cache is not None and not empty:
                self.cache = self.cache.restarted()  # recordings stay, with all they know
            elif keep:
                self._fresh_cache()
            return
        if new and self.cache is not None:
            forget = [row in new for row in range(before)]
            self.cache = self.cache.reset(to_device(forget, self.device, torch.bool))
        if empty:
            rows = to_device(keep, self.device)
            self._keep(rows)
            if self.cache is not None:
                self.cache = self.cache.select(rows)
            if self.replay is not None:
                self.replay.forget()

    def _keep(self, rows: list[int] | Tensor) -> None:
        self.x = self.x[rows]
        if self.sure is not None:
            self.sure = self.sure[rows]

    def window(self, starts: list[int], width: int) -> Tensor:
        """Tokens starts[b] .. starts[b] + width - 1 of row b, [B, width]; past the end any."""
        if len(set(starts)) == 1 and starts[0] + width <= self.x.shape[1]:
            return self.x[:, starts[0] : starts[0] + width]
        return self._behind(to_device(starts, self.device), width)

    def _behind(self, starts: Tensor, width: int) -> Tensor:
        behind = compiled(_behind) if self.compiled else _behind
        with compiling(self.compiled):
            return behind(self.x, starts, width)

    def tails(self, width: int, ends: list[int]) -> list[Tensor]:
        """The last (at most) `width` tokens of the first ends[b] of row b. Waits for the device."""
        starts = [max(0, end - width) for end in ends]
        tails = self.window(starts, max(e - s for e, s in zip(ends, starts, strict=True))).cpu()
        return [t[: e - s] for t, e, s in zip(tails, ends, starts, strict=True)]


def _behind(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """The `width` tokens of each row of x [B, N] from starts [B] on; past the end the last one."""
    places = starts[:, None] + torch.arange(width, device=x.device)
    return x.gather(1, places.clamp(max=x.shape[1] - 1))


def _add_sum(total: Tensor, answer: Tensor, column: int) -> None:
    """To total, of answer [..., V] one column."""
    total += answer[..., column].sum()


class Replay:
    """Evaluations as CUDA graphs: a pass over a block is a thousand small kernels, and starting
    them one by one takes the host longer than the device needs to run them.

    A function is run as it is when it first meets tensors of some shapes, recorded the second time
    and replayed from then on. All recordings share their memory.
    """

    def __init__(self):
        self.recordings: dict[Hashable, _Recording] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, name: Hashable, function: Callable[..., Tensor | None], *inputs: Tensor
    ) -> Tensor | None:
        """function(*inputs). Under one name all it reads and writes beside the inputs must stay
        where it is. The next call overwrites what was returned."""
        key = (name, *((x.shape, x.dtype) for x in inputs))
        if key not in self.recordings:
            self.recordings[key] = _Recording(inputs)
        return self.recordings[key](function, inputs, self.pool)

    def forget(self) -> None:
        """The tensors beside the inputs have moved. A pool ends with the last recording in it."""
        self.recordings.clear()
        self.pool = torch.cuda.graph_pool_handle()


class _Recording:
    def __init__(self, inputs: tuple[Tensor, ...]):
        self.inputs = [x.clone() for x in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tried = False
        self.result: Tensor | None = None

    def __call__(self, function, inputs: tuple[Tensor, ...], pool) -> Tensor | None:
        for ours, given in zip(self.inputs, inputs, strict=True):
            ours.copy_(given)
        if not self.tried:  # on the very tensors of the recording: nothing is compiled during it
            self.tried = True
            return function(*self.inputs)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.result = function(*self.inputs)
            self.graph = graph
        self.graph.replay()
        return self.result
