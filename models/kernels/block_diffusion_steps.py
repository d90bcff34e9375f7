"""The forward pass of block_diffusion.py, and what its gradients share with it.

A program takes one tile of one part (a noised version or the clean text) of one sample and head.
Tiles of the other side that it sees as a whole come without a mask; only those at the border have
one. Scores are in units of log 2.
"""

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

forward = load_rows = load_numbers = place_of = None  # without Triton
seen_by = store_rows = visible = None


if triton is not None:

    @triton.jit
    def place_of(tiles, PARTS: tl.constexpr, HEADS: tl.constexpr):
        """Which tile of queries, part, head and sample this program takes: those of a head beside
        each other, as they read the same keys, and first the last tiles, which see most."""
        of_head, other = tl.program_id(0) % (tiles * PARTS), tl.program_id(0) // (tiles * PARTS)
        sample = (other // HEADS).to(tl.int64)
        return tiles - 1 - of_head // PARTS, of_head % PARTS, other % HEADS, sample

    @triton.jit
    def load_rows(start, token, row, lane, length, EVEN: tl.constexpr):
        """[rows, D] from `start`, `token` numbers from one to the next; zeros behind the end."""
        at = start + row[:, None] * token + lane[None, :]
        if EVEN:
            return tl.load(at)
        return tl.load(at, mask=(row < length)[:, None], other=0)

    @triton.jit
    def load_numbers(start, row, length, EVEN: tl.constexpr):
        if EVEN:
            return tl.load(start + row)
        return tl.load(start + row, mask=row < length, other=0)

    @triton.jit
    def seen_by(row, clean, SIZE: tl.constexpr, CAUSAL: tl.constexpr):
        """How many clean keys a query of a place in the text sees; clean: 1 for one of x0, else
        0."""
        if CAUSAL:
            return row // SIZE * SIZE * (1 - clean) + (row + 1) * clean
        return (row // SIZE + clean) * SIZE

    @triton.jit
    def visible(row, column, clean, SIZE: tl.constexpr, CAUSAL: tl.constexpr, KIND: tl.constexpr):
        """Which of the keys `column` the queries `row` see; both broadcast. KIND: "own", noised
        keys of the same block; "earlier", clean ones up to a border; "all" needs no mask."""
        if KIND == "own":
            return row // SIZE == column // SIZE
        return column < seen_by(row, clean, SIZE, CAUSAL)

    @triton.jit
    def store_rows(
        start, token, row, lane, length, x, cos, sin, turned, EVEN: tl.constexpr, D: tl.constexpr
    ):
        """Write x [rows, D]; with cos and sin turned back by the angles of its rows, which begin at
        `turned`."""
        live = (row < length)[:, None]
        at = start + row[:, None] * token
        if cos is None:
            if EVEN:
                tl.store(at + lane[None, :], x.to(start.dtype.element_ty))
            else:
                tl.store(at + lane[None, :], x.to(start.dtype.element_ty), mask=live)
        else:
            half = tl.arange(0, D // 2)[None, :]
            angle = (turned + row)[:, None] * (D // 2) + half
            c = tl.load(cos + angle, mask=live, other=0)
            s = tl.load(sin + angle, mask=live, other=0)
            a, b = tl.split(tl.permute(tl.reshape(x, x.shape[0], 2, D // 2), 0, 2, 1))
            tl.store(at + half, (a * c + b * s).to(start.dtype.element_ty), mask=live)
            tl.store(at + half + D // 2, (b * c - a * s).to(start.dtype.element_ty), mask=live)

    @triton.jit
    def _answered(
        acc,
        most,
        total,
        queries,
        row,
        clean,
        keys,
        key_token,
        values,
        value_token,
        lane,
        begin,
        end,
        length,
        scale,
        SIZE: tl.constexpr,
        CAUSAL: tl.constexpr,
        KIND: tl.constexpr,
        EVEN: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """The running softmax (arXiv:2205.14135) after the keys from begin to end. What is hidden
        is a power of two, and that times the scale is exact: what a tile of nothing else adds to a
        row is taken back, to 0, by the first key that the row sees."""
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k = load_rows(keys, key_token, column, lane, length, EVEN)
            scores = tl.dot(queries, tl.trans(k))
            if KIND != "all":
                seen = visible(row[:, None], column[None, :], clean, SIZE, CAUSAL, KIND)
                scores = tl.where(seen, scores, -(2.0**100))
            larger = tl.maximum(most, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - larger[:, None])
            shrunk = tl.exp2(most - larger)
            total = total * shrunk + tl.sum(p, 1)
            v = load_rows(values, value_token, column, lane, length, EVEN)
            acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None])
            most = larger
        return acc, most, total

    @triton.jit
    def forward(
        q,
        q_sample,
        q_token,
        q_head,
        k,
        k_sample,
        k_token,
        k_head,
        v,
        v_sample,
        v_token,
        v_head,
        out,
        logs,
        length,
        scale,
        HEADS: tl.constexpr,
        GROUPS: tl.constexpr,
        D: tl.constexpr,
        VIEWS: tl.constexpr,
        ASKING: tl.constexpr,
        SIZE: tl.constexpr,
        CAUSAL: tl.constexpr,
        EVEN: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        tile, part, head, sample = place_of(tl.cdiv(length, ROWS), ASKING, HEADS)
        first = tile * ROWS
        clean = part // VIEWS  # 1 for the clean text, else 0
        row, lane = first + tl.arange(0, ROWS), tl.arange(0, D)
        last = min(first + ROWS, length) - 1
        base = q + sample * q_sample + head * q_head + part * length * q_token
        queries = load_rows(base, q_token, row, lane, length, EVEN)
        keys = k + sample * k_sample + head // GROUPS * k_head
        values = v + sample * v_sample + head // GROUPS * v_head
        keys0, values0 = keys + VIEWS * length * k_token, values + VIEWS * length * v_token
        acc = tl.zeros([ROWS, D], tl.float32)
        most, total = tl.full([ROWS], -(2.0**100), tl.float32), tl.zeros([ROWS], tl.float32)
        whole = seen_by(first, clean, SIZE, CAUSAL) // COLUMNS * COLUMNS
        end = min(seen_by(last, clean, SIZE, CAUSAL), length)
        acc, most, total = _answered(
            acc, most, total, queries, row, clean, keys0, k_token, values0, v_token, lane,
            0, whole, length, scale, SIZE, CAUSAL, "all", EVEN, COLUMNS,
        )  # fmt: skip
        acc, most, total = _answered(
            acc, most, total, queries, row, clean, keys0, k_token, values0, v_token, lane,
            whole, end, length, scale, SIZE, CAUSAL, "earlier", EVEN, COLUMNS,
        )  # fmt: skip
        if part < VIEWS:
            begin = first // SIZE * SIZE // COLUMNS * COLUMNS
            end = min((last // SIZE + 1) * SIZE, length)
            keys += part * length * k_token
            values += part * length * v_token
            acc, most, total = _answered(
                acc, most, total, queries, row, clean, keys, k_token, values, v_token, lane,
                begin, end, length, scale, SIZE, CAUSAL, "own", EVEN, COLUMNS,
            )  # fmt: skip
        asked = ASKING * length
        log = most + tl.log2(total)
        at = (sample * HEADS + head) * asked + part * length
        tl.store(logs + at + row, log, mask=row < length)
        base = out + ((sample * asked + part * length) * HEADS + head) * D
        store_rows(base, HEADS * D, row, lane, length, acc / total[:, None], None, None, 0, EVEN, D)
