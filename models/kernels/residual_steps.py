"""The two kernels of residual.py."""

try:  # see decode.py
    import triton
    import triton.language as tl
except ImportError:
    triton = None

COUNTS = ["tokens", "limit"]  # any values: one kernel
forward = backward = None  # without Triton


if triton is not None:

    @triton.jit
    def _mixed(h):
        """A bijection of 32 bits: every bit of the result depends on all of h. The constants are
        those of lowbias32 (C. Wellons, hash-prospector, 2018)."""
        h ^= h >> 16
        h *= 0x7FEB352D
        h ^= h >> 15
        h *= 0x846CA68B
        return h ^ (h >> 16)

    @triton.jit
    def _dropped(branch, at, first, second, limit, factor):
        """branch after dropout: what its places, hashed with both halves of the seed, decide."""
        h = _mixed(_mixed(at.to(tl.uint32) ^ first) + second)
        return tl.where(h < limit, 0.0, branch * factor)

    @triton.jit(do_not_specialize=COUNTS)
    def forward(
        x,
        branch,
        gate,
        gate_row,
        seed,
        weight,
        shift,
        shift_row,
        scale,
        scale_row,
        total,
        y,
        stats,
        all_rows,
        tokens,
        limit,
        factor,
        WIDTH: tl.constexpr,
        LANES: tl.constexpr,
        EPS: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        parts = tl.cdiv(tokens, ROWS)
        sample = (tl.program_id(0) // parts).to(tl.int64)
        start = tl.program_id(0) % parts * ROWS
        lane = tl.arange(0, LANES)
        inside = lane < WIDTH
        if gate is not None:
            g = tl.load(gate + sample * gate_row + lane, mask=inside, other=0).to(tl.float32)
        if seed is not None:
            drawn = tl.load(seed)
            first, second = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
            limit = limit.to(tl.uint32)
        if weight is not None:
            w = tl.load(weight + lane, mask=inside, other=0).to(tl.float32)
        if shift is not None:
            a = tl.load(shift + sample * shift_row + lane, mask=inside, other=0).to(tl.float32)
            m = 1 + tl.load(scale + sample * scale_row + lane, mask=inside, other=0).to(tl.float32)
        for i in range(0, ROWS, TILE):
            row = start + i + tl.arange(0, TILE)
            live = row < tokens
            mask = live[:, None] & inside[None, :]
            place = sample * tokens + row
            at = place[:, None] * WIDTH + lane[None, :]
            v = tl.load(x + at, mask=mask, other=0).to(tl.float32)
            if branch is not None:
                b = tl.load(branch + at, mask=mask, other=0).to(tl.float32)
                if seed is not None:
                    b = _dropped(b, at, first, second, limit, factor)
                if gate is not None:
                    b *= g[None, :]
                v += b
            kept = v.to(total.dtype.element_ty)
            tl.store(total + at, kept, mask=mask)
            if weight is not None:
                v = kept.to(tl.float32)
                mean = tl.sum(v, 1) / WIDTH
                v = tl.where(mask, v - mean[:, None], 0)
                inverse = tl.rsqrt(tl.sum(v * v, 1) / WIDTH + EPS)
                tl.store(stats + place, mean, mask=live)
                tl.store(stats + all_rows + place, inverse, mask=live)
                v *= inverse[:, None] * w[None, :]
                if shift is not None:
                    v = v * m[None, :] + a[None, :]
                tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=COUNTS)
    def backward(
        d_total,
        d_y,
        total,
        stats,
        branch,
        gate,
        gate_row,
        seed,
        weight,
        scale,
        scale_row,
        d_x,
        d_branch,
        sums,
        all_rows,
        tokens,
        limit,
        factor,
        WIDTH: tl.constexpr,
        LANES: tl.constexpr,
        ROWS: tl.constexpr,
        TILE: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        parts = tl.cdiv(tokens, ROWS)
        sample = (tl.program_id(0) // parts).to(tl.int64)
        start = tl.program_id(0) % parts * ROWS
        lane = tl.arange(0, LANES)
        inside = lane < WIDTH
        if gate is not None:
            g = tl.load(gate + sample * gate_row + lane, mask=inside, other=0).to(tl.float32)
            d_gate = tl.zeros([LANES], tl.float32)
        if seed is not None:
            drawn = tl.load(seed)
            first, second = drawn.to(tl.uint32), (drawn >> 32).to(tl.uint32)
            limit = limit.to(tl.uint32)
        if weight is not None:
            w = tl.load(weight + lane, mask=inside, other=0).to(tl.float32)
            d_shift = tl.zeros([LANES], tl.float32)
            d_scaled = tl.zeros([LANES], tl.float32)
            m = tl.full([LANES], 1, tl.float32)
            if scale is not None:
                m += tl.load(scale + sample * scale_row + lane, mask=inside, other=0).to(tl.float32)
        for i in tl.range(0, ROWS, TILE, num_stages=STAGES):
            row = start + i + tl.arange(0, TILE)
            live = row < tokens
            mask = live[:, None] & inside[None, :]
            place = sample * tokens + row
            at = place[:, None] * WIDTH + lane[None, :]
            d = tl.load(d_total + at, mask=mask, other=0).to(tl.float32)
            if weight is not None:
                mean = tl.load(stats + place, mask=live, other=0)
                inverse = tl.load(stats + all_rows + place, mask=live, other=0)
                v = tl.load(total + at, mask=mask, other=0).to(tl.float32)
                v = tl.where(mask, (v - mean[:, None]) * inverse[:, None], 0)
                dy = tl.load(d_y + at, mask=mask, other=0).to(tl.float32)
                d_shift += tl.sum(dy, 0)
                d_scaled += tl.sum(dy * v, 0)
                dy *= (w * m)[None, :]
                slope = tl.sum(dy * v, 1) / WIDTH
                dy -= (tl.sum(dy, 1) / WIDTH)[:, None] + v * slope[:, None]
                d += dy * inverse[:, None]
                tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=mask)
            if branch is not None:
                if gate is not None:
                    b = tl.load(branch + at, mask=mask, other=0).to(tl.float32)
                    if seed is not None:
                        b = _dropped(b, at, first, second, limit, factor)
                    d_gate += tl.sum(d * b, 0)
                    d *= g[None, :]
                if seed is not None:
                    d = _dropped(d, at, first, second, limit, factor)
                tl.store(d_branch + at, d.to(d_branch.dtype.element_ty), mask=mask)
        found = sums + tl.program_id(0).to(tl.int64) * 4 * WIDTH + lane
        if gate is not None:
            tl.store(found, d_gate, mask=inside)
        if weight is not None:
            tl.store(found + WIDTH, d_shift, mask=inside)
            tl.store(found + 2 * WIDTH, d_scaled * w, mask=inside)
            tl.store(found + 3 * WIDTH, d_scaled * m, mask=inside)
