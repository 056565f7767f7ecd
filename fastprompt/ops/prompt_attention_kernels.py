"""Device code of `prompt_attention`: the forward kernel, and what it shares with the backward.

With c = scale · log2(e), every exponential is of base 2 and the running softmax of a query is

    top' = max(top, max_j c·s_j),   total' = total · 2^(top - top') + sum_j 2^(c·s_j - top')

over prompts first, then over tokens. The log-sum-exp leaves in base e: ln 2 · (top + log2 total).

Indices: b sample, h query head, n query, j key (a prompt or a token), d channel. Tokens and
prompts take the same path through every helper. What hides them is given as keep_ptr (bool, by
key; None for prompts), bias_ptr (bool or float, by query and key), `hide_at`'s offsets, CAUSAL and
window; whatever is None is compiled away. Of packed sequences a sample is one; its rows start at
`row` of the only batch entry there is.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# no kernel is compiled anew for a size that happens to divide by 16, or is 1
ANY_SIZE = ("B", "H", "N", "M", "P", "sequences", "splits", "window")

# ---- shared: where things lie ----


@triton.jit
def head_at(ptr, b, h, row, strides, UNIT: tl.constexpr, STEP: tl.constexpr):
    """Where `row` of head h of sample b lies, and how far apart rows are, as a STEP integer.

    Strides come in units of UNIT elements: that tells the compiler what they divide by, without
    which a head dim such as 72 would be loaded one element at a time. STEP is int32 where a whole
    block's offsets fit in it: they stay in registers throughout a loop.
    """
    unit = tl.full((), UNIT, tl.int64)  # int64 before any product
    at = b * (strides[0] * unit) + h * (strides[1] * unit) + row * (strides[2] * unit)
    return ptr + at, (strides[2] * unit).to(STEP)


@triton.jit
def pair_at(x_ptr, y_ptr, b, h, row, x_strides, y_strides, UNIT: tl.constexpr, STEP: tl.constexpr):
    x = head_at(x_ptr, b, h, row, x_strides, UNIT, STEP)
    return x + head_at(y_ptr, b, h, row, y_strides, UNIT, STEP)


@triton.jit
def packed_at(ptr, b, h, row, N, H, HEAD_DIM: tl.constexpr):
    """`head_at` of a tensor whose memory is [B, N, H, HEAD_DIM]: every tensor we allocate."""
    step = H * tl.full((), HEAD_DIM, tl.int64)
    return ptr + (b * (N * step) + row * step + h * HEAD_DIM), step


@triton.jit
def hide_at(b, h, key_strides, bias_strides):
    """Offsets for `mask_scores`: of the sample and by key; of the head, by query and by key."""
    one = tl.full((), 1, tl.int64)
    plane = b * (bias_strides[0] * one) + h * (bias_strides[1] * one)
    row = b * (key_strides[0] * one)
    return row, key_strides[1] * one, plane, bias_strides[2] * one, bias_strides[3] * one


@triton.jit
def _at(start, step, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK, BLOCK_D] of the rows from `start` on, and which of their channels exist."""
    rows, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    first = start * tl.cast(step, tl.int64)
    return first + (rows[:, None] * step + d[None, :]), d[None, :] < HEAD_DIM


@triton.jit
def load_rows(
    ptr, start, limit, step,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK - 1 of a head; zeros past `limit` and past HEAD_DIM."""
    at, channels = _at(start, step, HEAD_DIM, BLOCK, BLOCK_D)
    rows = start + tl.arange(0, BLOCK)
    return tl.load(ptr + at, mask=(rows[:, None] < limit) & channels, other=0.0)


@triton.jit
def store_rows(
    ptr, value, start, limit, step,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at, channels = _at(start, step, HEAD_DIM, BLOCK, BLOCK_D)
    rows = start + tl.arange(0, BLOCK)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(rows[:, None] < limit) & channels)


# ---- shared: which rows a program works on ----


@triton.jit
def span(ends_ptr, sample, N):
    """First row and number of rows of a sample."""
    first = 0
    if ends_ptr is not None:
        first = tl.load(ends_ptr + sample).to(tl.int32)
        N = tl.load(ends_ptr + sample + 1).to(tl.int32) - first
    return first, N


@triton.jit
def row_block(pid, ends_ptr, sequences, N, H, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, batch entry, head, first row of the block) of a program.

    Of packed sequences there is room for one block more than rows could need in each: whoever
    gets none starts past the end of the last sequence.
    """
    blocks = tl.cdiv(N, BLOCK)
    if ends_ptr is not None:
        blocks += sequences
    block, bh = pid % blocks, (pid // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    sample = b
    start = block * BLOCK
    if ends_ptr is not None:
        sample, start = _packed_block(block, ends_ptr, sequences, N, BLOCK)
    elif LAST_FIRST:  # under causality the longest rows come first
        start = (blocks - 1 - block) * BLOCK
    return sample, b, h, start


@triton.jit
def _packed_block(block, ends_ptr, sequences, N, BLOCK: tl.constexpr):
    sample, before, done = 0, 0, 0
    for first in range(0, sequences, 128):
        i = first + tl.arange(0, 128)
        low = tl.load(ends_ptr + i, mask=i < sequences, other=0)
        high = tl.load(ends_ptr + i + 1, mask=i < sequences, other=0)
        ends = done + tl.cumsum(tl.cdiv((high - low).to(tl.int32), BLOCK), 0)
        passed = (ends <= block) & (i < sequences)
        sample += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        done = tl.max(ends, 0)
    start = tl.where(sample < sequences, (block - before) * BLOCK, N)
    return tl.minimum(sample, sequences - 1).to(tl.int64), start


@triton.jit
def prompts_of(index_ptr, length_ptr, sample, P):
    """The sample's set of prompts, and how many rows that has."""
    which = tl.full((), 0, tl.int64)
    if index_ptr is not None:
        which = tl.load(index_ptr + sample).to(tl.int64)
    if length_ptr is not None:
        P = tl.load(length_ptr + which).to(tl.int32)
    return which, P


@triton.jit
def key_range(
    start, N, M, window, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Keys first .. end - 1 may be seen by a query of a block, those from first to clear by all."""
    first = 0
    end = M
    clear = M // BLOCK_K * BLOCK_K
    if CAUSAL:
        end = tl.minimum(start + BLOCK_Q, N) + (M - N)
        clear = (start + 1 + (M - N)) // BLOCK_K * BLOCK_K
    if window is not None:
        first = tl.maximum(start + (M - N) - window + 1, 0) // BLOCK_K * BLOCK_K
        if not CAUSAL:
            end = tl.minimum(start + BLOCK_Q - 1 + (M - N) + window, M)
        clear = first
    return first, clear, end


# ---- shared: scores ----


@triton.jit
def in_base2(scale, x):
    """c > 0, and x with scale's sign: a maximum over s is one over c·s, and c·-inf is -inf."""
    return tl.maximum(tl.abs(scale) * LOG2E, 1e-30), tl.where(scale < 0, -x, x)


@triton.jit
def _tanh(x):
    """To a few units in the last place everywhere: near 0 a difference of exponentials is not."""
    y = x * x
    small = -929569.0 / 638512875.0
    small = small * y + 21844.0 / 6081075.0
    small = small * y - 1382.0 / 155925.0
    small = small * y + 62.0 / 2835.0
    small = small * y - 17.0 / 315.0
    small = small * y + 2.0 / 15.0
    small = small * y - 1.0 / 3.0
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.25, x + x * y * small, tl.where(x < 0, -large, large))


@triton.jit
def cap_scores(s, c, softcap):
    """s soft-capped, the factor that turns it into base-2 logits, and the slope of the cap."""
    slope = 1.0
    if softcap is not None:
        s = _tanh(s * (c / (softcap * LOG2E)))
        slope = 1.0 - s * s
        c = softcap * LOG2E
    return s, c, slope


@triton.jit
def mask_scores(s, c, n, j, N, J, ahead, keep_ptr, bias_ptr, hide, window, CAUSAL: tl.constexpr):
    """s with what is hidden at -inf, and the factor that turns it into base-2 logits.

    n and j are index tensors that broadcast to s, in either order. A float bias of the lowest
    float overflows to -inf here: hidden, as whoever writes it means.
    """
    row, key_step, plane, bias_n, bias_j = hide
    seen = j < J
    if bias_ptr is not None:
        at = bias_ptr + plane + (n * bias_n + j * bias_j)
        bias = tl.load(at, mask=(n < N) & seen, other=0)
        if bias_ptr.dtype.element_ty == tl.int1:
            seen = seen & (bias != 0)
        else:
            s = s * c + bias.to(tl.float32) * LOG2E
            c = 1.0
            if bias_ptr.dtype.element_ty == tl.float16:
                seen = seen & (bias > -65504.0)
    if keep_ptr is not None:
        seen = seen & (tl.load(keep_ptr + row + j * key_step, mask=j < J, other=0) != 0)
    if CAUSAL:
        seen = seen & (j <= n + ahead)
    if window is not None:
        seen = seen & (j > n + (ahead - window))
        if not CAUSAL:
            seen = seen & (j < n + (ahead + window))
    return tl.where(seen, s, float("-inf")), c


# ---- forward: a program answers BLOCK_Q queries of one head ----


@triton.jit
def _absorb(
    acc, total, top, q, c, keys, first, last, J, n, N, ahead, keep_ptr, bias_ptr, hide,
    window, softcap,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax of the queries n after keys first .. last - 1."""
    k_ptr, k_step, v_ptr, v_step = keys
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        k = load_rows(k_ptr, start, J, k_step, HEAD_DIM, BLOCK, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, factor, _ = cap_scores(s, c, softcap)
        if MASKED:
            j = start + tl.arange(0, BLOCK)
            s, factor = mask_scores(
                s, factor, n[:, None], j[None, :], N, J, ahead, keep_ptr, bias_ptr, hide, window,
                CAUSAL,
            )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1) * factor)
        finite = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        p = tl.exp2(s * factor - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, start, J, v_step, HEAD_DIM, BLOCK, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new
    return acc, total, top


@triton.jit(do_not_specialize=ANY_SIZE)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, keep_ptr, mask_ptr, bias_ptr,
    ends_q_ptr, ends_k_ptr, index_ptr, length_ptr,
    out_ptr, lse_ptr,
    B, H, N, M, P, sequences, splits, scale, window, softcap,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, out_strides,
    keep_strides, mask_strides, bias_strides,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse; with `splits`, of one share of the keys, for `merge_kernel` to add up."""
    pid = tl.program_id(0)
    split = 0
    if splits is not None:
        split, pid = pid % splits, pid // splits
    sample, b, h, start = row_block(pid, ends_q_ptr, sequences, N, H, CAUSAL, BLOCK_Q)
    rows = N
    row, N = span(ends_q_ptr, sample, N)
    key_row, M = span(ends_k_ptr, sample, M)
    if ends_q_ptr is not None:  # noqa: SIM102 (decided at compilation)
        if start >= N:
            return
    n = start + tl.arange(0, BLOCK_Q)
    q_base, q_step = head_at(q_ptr, b, h, row, q_strides, UNIT, STEP)
    q = load_rows(q_base, start, N, q_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    c, q = in_base2(scale, q)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)

    which, P = prompts_of(index_ptr, length_ptr, sample, P)
    own = pair_at(pk_ptr, pv_ptr, which, h // GROUPS, 0, pk_strides, pv_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, bias_strides)
    seen = P
    if splits is not None:
        seen = tl.where(split == 0, P, 0)
    acc, total, top = _absorb(
        acc, total, top, q, c, own, 0, seen, P, n, N, 0, None, bias_ptr, hide, None, softcap,
        False, True, 1, HEAD_DIM, BLOCK_P, BLOCK_D,
    )  # fmt: skip

    keys = pair_at(k_ptr, v_ptr, b, h // GROUPS, key_row, k_strides, v_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, mask_strides)
    first, clear, end = key_range(start, N, M, window, CAUSAL, BLOCK_Q, BLOCK_K)
    if splits is not None:
        share = tl.cdiv(tl.cdiv(M, BLOCK_K), splits) * BLOCK_K
        first = split * share
        end = tl.minimum(end, first + share)
        clear = tl.maximum(tl.minimum(clear, end // BLOCK_K * BLOCK_K), first)
    if keep_ptr is None and mask_ptr is None and window is None:
        acc, total, top = _absorb(
            acc, total, top, q, c, keys, first, clear, M, n, N, M - N, keep_ptr, mask_ptr, hide,
            window, softcap, CAUSAL, False, None, HEAD_DIM, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        clear = first
    acc, total, top = _absorb(
        acc, total, top, q, c, keys, clear, end, M, n, N, M - N, keep_ptr, mask_ptr, hide,
        window, softcap, CAUSAL, True, None, HEAD_DIM, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a query that saw nothing: zeros, lse = top = -inf
    into = b + split * B
    out_base, out_step = head_at(out_ptr, into, h, row, out_strides, UNIT, STEP)
    store_rows(out_base, acc / total[:, None], start, N, out_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    lse_base = lse_ptr + (into * H + h) * rows + row
    tl.store(lse_base + n, (top + tl.log2(total)) * LN2, mask=n < N)


@triton.jit(do_not_specialize=("rows", "splits"))
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out [rows, HEAD_DIM] and lse [rows] from shares [splits, rows, …], in their order."""
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    at = (split[:, None] * rows + row) * HEAD_DIM + d[None, :]
    there = (split[:, None] < splits) & (d[None, :] < HEAD_DIM)
    part = tl.load(part_ptr + at, mask=there, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + row, top + tl.log(tl.where(total > 0, total, 1.0)))
