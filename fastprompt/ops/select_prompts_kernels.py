"""Device code of `select_prompts`: the best keys of every query, then their prompts and the rest.

    s_bc = q_b · k_c · f(|q_b|²) · f(|k_c|²),    f(x) = 1/√x, 0 at x = 0, NaN where x is not finite

Inside a tile a NaN becomes BAD, so that scores can be compared, and a BAD key is still a key. What
is kept between tiles are ranks: int64 with the score's bits, in an order of integers, above the
complement of the index. So no two keys tie, and the higher rank is what comes first.

Indices: b query, c key, d channel of both; row of a prompt [L, E], e channel of it. Rows of a block
that do not exist repeat the last one that does: loads are masked by channel alone.
"""

import triton
import triton.language as tl

BAD = tl.constexpr(-8.0)  # below every cosine: a row's squared length is not finite
NONE = tl.constexpr(-16.0)  # below that: no key here, or one that was taken already
LAST = tl.constexpr(2**31 - 1)
LOWEST, HIGHEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)
# no kernel is compiled anew for a size that happens to divide by 16, or is 1
ANY_SIZE = ("B", "C", "k", "share", "splits", "parts", "L", "chunks")


# ---- ranks ----


@triton.jit
def _ordered(bits):
    """A float32's bits as an int32 of the same order; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _rank(score, index):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are a tie
    return (_ordered(bits).to(tl.int64) << 32) | (index ^ LAST).to(tl.int64)


@triton.jit
def _score(rank):
    return _ordered((rank >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


# ---- stage 1: a program ranks a share of the keys for BLOCK_B queries ----


@triton.jit
def _rows_at(ptr, first, rows, step, BLOCK: tl.constexpr):
    """Pointers [BLOCK, 1] to the rows from `first` on."""
    at = tl.minimum(first + tl.arange(0, BLOCK), rows - 1)
    return ptr + (at.to(tl.int64) * step)[:, None]


@triton.jit
def _inverse(square):
    """f above. By root and quotient: the hardware's inverse root takes a tiny square for 0."""
    inverse = 1.0 / tl.sqrt_rn(tl.where(square > 0, square, 1.0))
    inverse = tl.where(square == 0, 0.0, inverse)
    return tl.where(square < float("inf"), inverse, float("nan"))


@triton.jit
def _query_squares(at, D, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """Squared lengths [BLOCK_B]: once a program, the keys' come with the products."""
    squares = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=3):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(at + d, mask=d < D, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 1)


@triton.jit
def _products(
    q_at, k_at, D,
    DOT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q · k [BLOCK_B, BLOCK_C] and the squared lengths of the keys [BLOCK_C]."""
    # what a thread loads at once it adds up at once: sums of single channels take many registers
    VECTOR: tl.constexpr = 128 // k_at.dtype.element_ty.primitive_bitwidth
    dots = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_D // VECTOR), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        q = tl.load(q_at + d, mask=d < D, other=0.0).to(DOT)
        k = tl.load(k_at + d, mask=d < D, other=0).to(DOT)
        dots = tl.dot(q, tl.trans(k), dots, input_precision="ieee")
        wide = tl.reshape(k.to(tl.float32), (BLOCK_C, BLOCK_D // VECTOR, VECTOR))
        squares += tl.sum(wide * wide, 2)
    return dots, tl.sum(squares, 1)


@triton.jit
def _keep_best(best, scores, c):
    """The ranks `best` [BLOCK_B, SLOTS] after the keys c [1, BLOCK_C] with their scores.

    One key a row and turn, the highest first, until no row's next one is above the lowest that it
    has kept. A key that only ties with that one has the higher index: keys come in their order.
    """
    top, worst = tl.max(scores, 1), tl.min(best, 1)
    while tl.max((top > _score(worst)).to(tl.int32), 0) > 0:
        at = tl.min(tl.where(scores == top[:, None], c, LAST), 1)
        new = _rank(top, at)
        replaced = (best == worst[:, None]) & (new > worst)[:, None]
        best = tl.where(replaced, new[:, None], best)
        scores = tl.where(c == at[:, None], NONE, scores)
        top, worst = tl.max(scores, 1), tl.min(best, 1)
    return best


@triton.jit
def _sum_columns(
    pid, prompts_ptr, sums_ptr, C, L, chunks, E, stride_pc, stride_pr,
    SUM_C: tl.constexpr, SUM_E: tl.constexpr,
):  # fmt: skip
    """The sum over one of `chunks` shares of the prompts, for SUM_E channels."""
    across = tl.cdiv(E, SUM_E)
    chunk, column = pid % chunks, pid // chunks
    row = (column // across).to(tl.int64)
    e = column % across * SUM_E + tl.arange(0, SUM_E)[None, :]
    share = tl.cdiv(C, chunks)
    end = tl.minimum((chunk + 1) * share, C)
    total = tl.zeros((SUM_C, SUM_E), tl.float64)
    for first in tl.range(chunk * share, end, SUM_C, num_stages=4):
        c = (first + tl.arange(0, SUM_C))[:, None]
        at = prompts_ptr + row * stride_pr + c.to(tl.int64) * stride_pc + e
        total += tl.load(at, mask=(c < end) & (e < E), other=0.0).to(tl.float64)
    into = sums_ptr + (chunk * L + row) * E + e
    tl.store(into, tl.sum(total, 0)[None, :], mask=e < E)


@triton.jit(do_not_specialize=ANY_SIZE)
def rank_kernel(
    query_ptr, keys_ptr, scale_ptr, prompts_ptr,
    ranks_ptr, sums_ptr,
    B, C, k, share, splits, L, chunks, D, E,
    stride_qb, stride_kc, stride_sc, stride_pc, stride_pr,
    DOT: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM_C: tl.constexpr, SUM_E: tl.constexpr,
):  # fmt: skip
    """ranks [B, splits, k], in no order, and with sums_ptr the prompts' sums [chunks, L · E]."""
    pid = tl.program_id(0)
    if sums_ptr is not None:
        summing = chunks * L * tl.cdiv(E, SUM_E)
        if pid < summing:
            _sum_columns(
                pid, prompts_ptr, sums_ptr, C, L, chunks, E, stride_pc, stride_pr, SUM_C, SUM_E
            )
            return
        pid -= summing
    # neighbours read the same keys for other queries
    blocks = tl.cdiv(B, BLOCK_B)
    start, split = pid % blocks * BLOCK_B, pid // blocks
    q_at = _rows_at(query_ptr, start, B, stride_qb, BLOCK_B)
    q_inverse = _inverse(_query_squares(q_at, D, BLOCK_B, BLOCK_D))

    slot = tl.arange(0, SLOTS)[None, :]
    # no two of a row alike, and those beyond k never the lowest
    best = _rank(tl.full((BLOCK_B, SLOTS), NONE, tl.float32), slot)
    best = tl.where(slot < k, best, HIGHEST)
    for first in range(split * share, tl.minimum(split * share + share, C), BLOCK_C):
        k_at = _rows_at(keys_ptr, first, C, stride_kc, BLOCK_C)
        dots, squares = _products(q_at, k_at, D, DOT, BLOCK_B, BLOCK_C, BLOCK_D)
        c = first + tl.arange(0, BLOCK_C)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c.to(tl.int64) * stride_sc, mask=c < C, other=0.0)
            dots, squares = dots * scale[None, :], squares * scale * scale
        scores = dots * q_inverse[:, None] * _inverse(squares)[None, :]
        scores = tl.where(tl.abs(scores) < 4.0, scores, BAD)  # NaN is not below 4
        best = _keep_best(best, tl.where((c < C)[None, :], scores, NONE), c[None, :])

    b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    tl.store(ranks_ptr + (b * splits + split) * k + slot, best, mask=(b < B) & (slot < k))


# ---- stage 2: a program writes a share of one query's tokens ----


@triton.jit(do_not_specialize=ANY_SIZE)
def gather_kernel(
    ranks_ptr, prompts_ptr, sums_ptr,
    tokens_ptr, indices_ptr, scores_ptr,
    C, k, splits, parts, L, chunks, E, stride_pc, stride_pr,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """tokens [B, k, L · E], or with sums_ptr [B, k + 1, L · E]; indices and scores [B, k]."""
    part, b = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    slot, n = tl.arange(0, SLOTS), tl.arange(0, BLOCK_N)
    ranks = tl.load(ranks_ptr + b * splits * k + n, mask=n < splits * k, other=LOWEST)
    best = tl.zeros((SLOTS,), tl.int64)
    for i in range(k):
        top = tl.max(ranks, 0)
        best = tl.where(slot == i, top, best)
        ranks = tl.where(ranks == top, LOWEST, ranks)
    index = (best & LAST) ^ LAST
    if part == 0:
        score = _score(best)
        tl.store(indices_ptr + b * k + slot, index, mask=slot < k)
        score = tl.where(score == BAD, float("-inf"), score)
        tl.store(scores_ptr + b * k + slot, score, mask=slot < k)

    rows = k
    if sums_ptr is not None:
        rows = k + 1
    across = tl.cdiv(E, BLOCK_E)
    width = L.to(tl.int64) * E
    for block in range(part, L * across, parts):
        row = (block // across).to(tl.int64)
        e = block % across * BLOCK_E + tl.arange(0, BLOCK_E)
        there = (slot < k)[:, None] & (e < E)[None, :]
        at = prompts_ptr + row * stride_pr + index[:, None] * stride_pc + e[None, :]
        chosen = tl.load(at, mask=there, other=0.0)
        column = row * E + e
        into = tokens_ptr + b * rows * width + column
        tl.store(into[None, :] + slot[:, None] * width, chosen, mask=there)
        if sums_ptr is not None:
            # in float64: what is left of a sum after most of it was taken away must be right
            rest = -tl.sum(chosen.to(tl.float64), 0)
            for chunk in range(chunks):
                rest += tl.load(sums_ptr + chunk * width + column, mask=e < E, other=0.0)
            mean = rest / (C - k).to(tl.float64)
            tl.store(into + k * width, mean.to(tokens_ptr.dtype.element_ty), mask=e < E)
