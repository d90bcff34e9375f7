"""The backward pass of block_diffusion.py: one kernel for queries, one for keys and values."""

from .block_diffusion_steps import load_numbers, load_rows, place_of, seen_by, store_rows, visible

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

backward_queries = backward_keys = None  # without Triton


if triton is not None:

    @triton.jit
    def _of_queries(
        d_q,
        queries,
        d_out,
        log,
        delta,
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
        """d_q and what the keys from begin to end add to it."""
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k = load_rows(keys, key_token, column, lane, length, EVEN)
            v = load_rows(values, value_token, column, lane, length, EVEN)
            p = tl.exp2(tl.dot(queries, tl.trans(k)) * scale - log[:, None])
            if KIND != "all":
                seen = visible(row[:, None], column[None, :], clean, SIZE, CAUSAL, KIND)
                p = tl.where(seen, p, 0.0)
            d_scores = p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])
            d_q = tl.dot(d_scores.to(k.dtype), k, d_q)
        return d_q

    @triton.jit
    def backward_queries(
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
        d_out,
        d_sample,
        d_token,
        d_head,
        out,
        logs,
        deltas,
        d_q,
        dq_sample,
        dq_token,
        dq_head,
        cos,
        sin,
        angle_rows,
        length,
        scale,
        slope,
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
        """Also writes the sums of d_out * out of each row, which `backward_keys` reads."""
        tile, part, head, sample = place_of(tl.cdiv(length, ROWS), ASKING, HEADS)
        first = tile * ROWS
        clean = part // VIEWS  # 1 for the clean text, else 0
        row, lane = first + tl.arange(0, ROWS), tl.arange(0, D)
        last = min(first + ROWS, length) - 1
        base = q + sample * q_sample + head * q_head + part * length * q_token
        queries = load_rows(base, q_token, row, lane, length, EVEN)
        base = d_out + sample * d_sample + head * d_head + part * length * d_token
        d = load_rows(base, d_token, row, lane, length, EVEN)
        asked = ASKING * length
        base = out + ((sample * asked + part * length) * HEADS + head) * D
        answer = load_rows(base, HEADS * D, row, lane, length, EVEN)
        delta = tl.sum(d.to(tl.float32) * answer.to(tl.float32), 1)
        at = (sample * HEADS + head) * asked + part * length
        tl.store(deltas + at + row, delta, mask=row < length)
        log = load_numbers(logs + at, row, length, EVEN)
        keys = k + sample * k_sample + head // GROUPS * k_head
        values = v + sample * v_sample + head // GROUPS * v_head
        keys0, values0 = keys + VIEWS * length * k_token, values + VIEWS * length * v_token
        found = tl.zeros([ROWS, D], tl.float32)
        whole = seen_by(first, clean, SIZE, CAUSAL) // COLUMNS * COLUMNS
        end = min(seen_by(last, clean, SIZE, CAUSAL), length)
        found = _of_queries(
            found, queries, d, log, delta, row, clean, keys0, k_token, values0, v_token, lane,
            0, whole, length, scale, SIZE, CAUSAL, "all", EVEN, COLUMNS,
        )  # fmt: skip
        found = _of_queries(
            found, queries, d, log, delta, row, clean, keys0, k_token, values0, v_token, lane,
            whole, end, length, scale, SIZE, CAUSAL, "earlier", EVEN, COLUMNS,
        )  # fmt: skip
        if part < VIEWS:
            begin = first // SIZE * SIZE // COLUMNS * COLUMNS
            end = min((last // SIZE + 1) * SIZE, length)
            keys += part * length * k_token
            values += part * length * v_token
            found = _of_queries(
                found, queries, d, log, delta, row, clean, keys, k_token, values, v_token, lane,
                begin, end, length, scale, SIZE, CAUSAL, "own", EVEN, COLUMNS,
            )  # fmt: skip
        base = d_q + sample * dq_sample + head * dq_head + part * length * dq_token
        turned = sample * angle_rows + part * length
        store_rows(base, dq_token, row, lane, length, found * slope, cos, sin, turned, EVEN, D)

    @triton.jit
    def _of_keys(
        d_k,
        d_v,
        keys,
        values,
        column,
        queries,
        q_token,
        d_out,
        d_token,
        logs,
        deltas,
        clean,
        lane,
        begin,
        end,
        length,
        scale,
        SIZE: tl.constexpr,
        CAUSAL: tl.constexpr,
        KIND: tl.constexpr,
        EVEN: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """d_k and d_v and what the queries from begin to end add to them. A row behind the end of
        the text adds nothing: its d_out and delta are 0."""
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            q = load_rows(queries, q_token, row, lane, length, EVEN)
            log = load_numbers(logs, row, length, EVEN)
            p = tl.exp2(tl.dot(keys, tl.trans(q)) * scale - log[None, :])
            if KIND != "all":
                seen = visible(row[None, :], column[:, None], clean, SIZE, CAUSAL, KIND)
                p = tl.where(seen, p, 0.0)
            d = load_rows(d_out, d_token, row, lane, length, EVEN)
            d_v = tl.dot(p.to(d.dtype), d, d_v)
            delta = load_numbers(deltas, row, length, EVEN)
            d_scores = p * (tl.dot(values, tl.trans(d)) - delta[None, :])
            d_k = tl.dot(d_scores.to(q.dtype), q, d_k)
        return d_k, d_v

    @triton.jit
    def backward_keys(
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
        d_out,
        d_sample,
        d_token,
        d_head,
        logs,
        deltas,
        d_k,
        dk_sample,
        dk_token,
        dk_head,
        d_v,
        dv_sample,
        dv_token,
        dv_head,
        cos,
        sin,
        angle_rows,
        length,
        scale,
        slope,
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
        """HEADS and GROUPS: of the queries, and how many of them share keys and values."""
        tiles = tl.cdiv(length, COLUMNS)
        of_head = tl.program_id(0) % (tiles * (VIEWS + 1))
        other = tl.program_id(0) // (tiles * (VIEWS + 1))
        part = VIEWS - of_head // tiles  # the clean ones, which most see, first
        first = of_head % tiles * COLUMNS
        kept = other % (HEADS // GROUPS)
        sample = (other // (HEADS // GROUPS)).to(tl.int64)
        column, lane = first + tl.arange(0, COLUMNS), tl.arange(0, D)
        last = min(first + COLUMNS, length) - 1
        base = k + sample * k_sample + kept * k_head + part * length * k_token
        keys = load_rows(base, k_token, column, lane, length, EVEN)
        base = v + sample * v_sample + kept * v_head + part * length * v_token
        values = load_rows(base, v_token, column, lane, length, EVEN)
        found_k, found_v = tl.zeros([COLUMNS, D], tl.float32), tl.zeros([COLUMNS, D], tl.float32)
        for group in range(GROUPS):
            head = kept * GROUPS + group
            queries = q + sample * q_sample + head * q_head
            d = d_out + sample * d_sample + head * d_head
            at = (sample * HEADS + head) * (ASKING * length)
            if part < VIEWS:
                begin = first // SIZE * SIZE // ROWS * ROWS
                end = min((last // SIZE + 1) * SIZE, length)
                places = part * length
                found_k, found_v = _of_keys(
                    found_k, found_v, keys, values, column,
                    queries + places * q_token, q_token, d + places * d_token, d_token,
                    logs + at + places, deltas + at + places, 0, lane,
                    begin, end, length, scale, SIZE, CAUSAL, "own", EVEN, ROWS,
                )  # fmt: skip
            else:
                for asking in range(ASKING):
                    clean = asking // VIEWS
                    # the first row that sees the first key, and the first that sees the last
                    begin = (first // SIZE + 1 - clean) * SIZE
                    whole = (last // SIZE + 1 - clean) * SIZE
                    if CAUSAL:
                        begin = begin * (1 - clean) + first * clean
                        whole = whole * (1 - clean) + last * clean
                    begin = begin // ROWS * ROWS
                    whole = min(tl.cdiv(whole, ROWS) * ROWS, tl.cdiv(length, ROWS) * ROWS)
                    places = asking * length
                    found_k, found_v = _of_keys(
                        found_k, found_v, keys, values, column,
                        queries + places * q_token, q_token, d + places * d_token, d_token,
                        logs + at + places, deltas + at + places, clean, lane,
                        begin, whole, length, scale, SIZE, CAUSAL, "earlier", EVEN, ROWS,
                    )  # fmt: skip
                    found_k, found_v = _of_keys(
                        found_k, found_v, keys, values, column,
                        queries + places * q_token, q_token, d + places * d_token, d_token,
                        logs + at + places, deltas + at + places, clean, lane,
                        whole, length, length, scale, SIZE, CAUSAL, "all", EVEN, ROWS,
                    )  # fmt: skip
        base = d_k + sample * dk_sample + kept * dk_head + part * length * dk_token
        turned = sample * angle_rows + part * length
        store_rows(base, dk_token, column, lane, length, found_k * slope, cos, sin, turned, EVEN, D)
        base = d_v + sample * dv_sample + kept * dv_head + part * length * dv_token
        store_rows(base, dv_token, column, lane, length, found_v, None, None, 0, EVEN, D)
