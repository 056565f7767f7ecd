"""Device code of `prompt_attention`: the forward kernel, and what it shares with the backward.

With c = scale · log2(e), every exponential is of base 2 and the running softmax of a query is

    top' = max(top, max_j c·s_j),   total' = total · 2^(top - top') + sum_j 2^(c·s_j - top')

over prompts first, then over tokens. The log-sum-exp leaves in base e: ln 2 · (top + log2 total).

Indices: b sample, h query head, n query, j key (a prompt or a token), d channel. Tokens and
prompts take the same path through every helper. What hides them is given as three: keep_ptr (bool,
by key; None for prompts), bias_ptr (bool or float, by query and key) and `hide_at`'s offsets.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# no kernel is compiled anew for a size that happens to divide by 16, or is 1
ANY_SIZE = ("H", "N", "P")

# ---- shared: where things lie, what is seen ----


@triton.jit
def head_at(ptr, b, h, strides, UNIT: tl.constexpr, STEP: tl.constexpr):
    """Where head h of sample b starts, and how far apart its rows are, as a STEP integer.

    Strides come in units of UNIT elements: that tells the compiler what they divide by, without
    which a head dim such as 72 would be loaded one element at a time. STEP is int32 where a whole
    block's offsets fit in it: they stay in registers throughout a loop.
    """
    unit = tl.full((), UNIT, tl.int64)  # int64 before any product
    step = (strides[2] * unit).to(STEP)
    return ptr + (b * (strides[0] * unit) + h * (strides[1] * unit)), step


@triton.jit
def pair_at(x_ptr, y_ptr, b, h, x_strides, y_strides, UNIT: tl.constexpr, STEP: tl.constexpr):
    return head_at(x_ptr, b, h, x_strides, UNIT, STEP) + head_at(y_ptr, b, h, y_strides, UNIT, STEP)


@triton.jit
def packed_at(ptr, b, h, N, H, HEAD_DIM: tl.constexpr):
    """`head_at` of a tensor whose memory is [B, N, H, HEAD_DIM]: every tensor we allocate."""
    step = H * tl.full((), HEAD_DIM, tl.int64)
    return ptr + (b * (N * step) + h * HEAD_DIM), step


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


@triton.jit
def in_base2(scale, x):
    """c > 0, and x with scale's sign: a maximum over s is one over c·s, and c·-inf is -inf."""
    return tl.maximum(tl.abs(scale) * LOG2E, 1e-30), tl.where(scale < 0, -x, x)


@triton.jit
def mask_scores(s, c, n, j, N, J, ahead, keep_ptr, bias_ptr, hide, CAUSAL: tl.constexpr):
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
    if keep_ptr is not None:
        seen = seen & (tl.load(keep_ptr + row + j * key_step, mask=j < J, other=0) != 0)
    if CAUSAL:
        seen = seen & (j <= n + ahead)
    return tl.where(seen, s, float("-inf")), c


@triton.jit
def key_range(start, N, M, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys below `clear` are seen by every query of a block, from `end` on by none of them."""
    end = M
    clear = M // BLOCK_K * BLOCK_K
    if CAUSAL:
        end = tl.minimum(start + BLOCK_Q, N) + (M - N)
        clear = (start + 1 + (M - N)) // BLOCK_K * BLOCK_K
    return clear, end


@triton.jit
def query_block(N, H, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr):
    """This program's sample, head and first query; under causality the longest rows come first."""
    blocks = tl.cdiv(N, BLOCK_Q)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CAUSAL:
        block = blocks - 1 - block
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), block * BLOCK_Q


# ---- forward: a program answers BLOCK_Q queries of one head ----


@triton.jit
def _absorb(
    acc, total, top, q, c, keys, first, last, J, n, N, ahead, keep_ptr, bias_ptr, hide,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax of the queries n after keys first .. last - 1."""
    k_ptr, k_step, v_ptr, v_step = keys
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        k = load_rows(k_ptr, start, J, k_step, HEAD_DIM, BLOCK, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = c
        if MASKED:
            j = start + tl.arange(0, BLOCK)
            s, factor = mask_scores(
                s, c, n[:, None], j[None, :], N, J, ahead, keep_ptr, bias_ptr, hide, CAUSAL
            )
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
    out_ptr, lse_ptr,
    H, N, M, P, scale,
    q_strides, k_strides, v_strides, pk_strides, pv_strides,
    keep_strides, mask_strides, bias_strides,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h, start = query_block(N, H, CAUSAL, BLOCK_Q)
    n = start + tl.arange(0, BLOCK_Q)
    q_base, q_step = head_at(q_ptr, b, h, q_strides, UNIT, STEP)
    q = load_rows(q_base, start, N, q_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    c, q = in_base2(scale, q)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)

    own = pair_at(pk_ptr, pv_ptr, 0, h // GROUPS, pk_strides, pv_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, bias_strides)
    acc, total, top = _absorb(
        acc, total, top, q, c, own, 0, P, P, n, N, 0, None, bias_ptr, hide,
        False, True, 1, HEAD_DIM, BLOCK_P, BLOCK_D,
    )  # fmt: skip

    keys = pair_at(k_ptr, v_ptr, b, h // GROUPS, k_strides, v_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, mask_strides)
    clear, end = key_range(start, N, M, CAUSAL, BLOCK_Q, BLOCK_K)
    if keep_ptr is None and mask_ptr is None:
        acc, total, top = _absorb(
            acc, total, top, q, c, keys, 0, clear, M, n, N, M - N, keep_ptr, mask_ptr, hide,
            CAUSAL, False, None, HEAD_DIM, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        clear = 0
    acc, total, top = _absorb(
        acc, total, top, q, c, keys, clear, end, M, n, N, M - N, keep_ptr, mask_ptr, hide,
        CAUSAL, True, None, HEAD_DIM, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a query that saw nothing: zeros, lse = top = -inf
    out_base, out_step = packed_at(out_ptr, b, h, N, H, HEAD_DIM)
    store_rows(out_base, acc / total[:, None], start, N, out_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * N + n, (top + tl.log2(total)) * LN2, mask=n < N)
