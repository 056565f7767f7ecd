"""Device code of `prompt_attention`'s gradients: dq, dk and dv, the prompts', and a sum.

Probabilities are recomputed from forward's log-sum-exp, p_j = 2^(c·s_j - lse·log2 e), so that
no [N, M] matrix is ever stored; the algebra is in `prompt_attention`. A program owns queries (dq:
a loop over prompts, then tokens) or keys (all else: a loop over queries), so that every gradient is
summed in registers, by one program, or in shares that one kernel adds in order.
"""

import triton
import triton.language as tl

from fastprompt.ops.prompt_attention_kernels import (
    ANY_SIZE,
    LOG2E,
    cap_scores,
    head_at,
    hide_at,
    in_base2,
    key_range,
    load_rows,
    mask_scores,
    packed_at,
    pair_at,
    prompts_of,
    row_block,
    span,
    store_rows,
)


@triton.jit
def _rows(lse_ptr, n, N):
    """lse in base 2; +inf where a query saw nothing or does not exist, so that its p is 0."""
    lse = tl.load(lse_ptr + n, mask=n < N, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, c, keys, first, last, J, n, N, ahead, keep_ptr, bias_ptr, hide,
    window, softcap,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq (before its factor scale) of the queries n after keys first .. last - 1."""
    k_ptr, k_step, v_ptr, v_step = keys
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        k = load_rows(k_ptr, start, J, k_step, HEAD_DIM, BLOCK, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, factor, slope = cap_scores(s, c, softcap)
        if MASKED:
            j = start + tl.arange(0, BLOCK)
            s, factor = mask_scores(
                s, factor, n[:, None], j[None, :], N, J, ahead, keep_ptr, bias_ptr, hide, window,
                CAUSAL,
            )  # fmt: skip
        p = tl.exp2(s * factor - lse[:, None])
        v = load_rows(v_ptr, start, J, v_step, HEAD_DIM, BLOCK, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=ANY_SIZE)
def dq_kernel(
    dout_ptr, out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, pk_ptr, pv_ptr, keep_ptr, mask_ptr, bias_ptr,
    ends_q_ptr, ends_k_ptr, index_ptr, length_ptr,
    dq_ptr, delta_ptr,
    H, N, M, P, sequences, scale, window, softcap,
    dout_strides, out_strides, q_strides, k_strides, v_strides, pk_strides, pv_strides,
    keep_strides, mask_strides, bias_strides,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum_d dout · out, which the kernels after this one read."""
    pid = tl.program_id(0)
    sample, b, h, start = row_block(pid, ends_q_ptr, sequences, N, H, CAUSAL, BLOCK_Q)
    rows = N
    row, N = span(ends_q_ptr, sample, N)
    key_row, M = span(ends_k_ptr, sample, M)
    if ends_q_ptr is not None:  # noqa: SIM102 (decided at compilation)
        if start >= N:
            return
    n = start + tl.arange(0, BLOCK_Q)
    dout_base, dout_step = head_at(dout_ptr, b, h, row, dout_strides, UNIT, STEP)
    out_base, out_step = head_at(out_ptr, b, h, row, out_strides, UNIT, STEP)
    dout = load_rows(dout_base, start, N, dout_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    out = load_rows(out_base, start, N, out_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    at = (b * H + h) * rows + row
    tl.store(delta_ptr + at + n, delta, mask=n < N)
    lse = _rows(lse_ptr + at, n, N)

    q_base, q_step = head_at(q_ptr, b, h, row, q_strides, UNIT, STEP)
    q = load_rows(q_base, start, N, q_step, HEAD_DIM, BLOCK_Q, BLOCK_D)
    c, q = in_base2(scale, q)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    which, P = prompts_of(index_ptr, length_ptr, sample, P)
    own = pair_at(pk_ptr, pv_ptr, which, h // GROUPS, 0, pk_strides, pv_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, bias_strides)
    dq = _dq_blocks(
        dq, q, dout, lse, delta, c, own, 0, P, P, n, N, 0, None, bias_ptr, hide, None, softcap,
        False, True, 1, HEAD_DIM, BLOCK_P, BLOCK_D,
    )  # fmt: skip

    keys = pair_at(k_ptr, v_ptr, b, h // GROUPS, key_row, k_strides, v_strides, UNIT, STEP)
    hide = hide_at(b, h, keep_strides, mask_strides)
    first, clear, end = key_range(start, N, M, window, CAUSAL, BLOCK_Q, BLOCK_K)
    if keep_ptr is None and mask_ptr is None and window is None:
        dq = _dq_blocks(
            dq, q, dout, lse, delta, c, keys, first, clear, M, n, N, M - N, keep_ptr, mask_ptr,
            hide, window, softcap, CAUSAL, False, None, HEAD_DIM, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        clear = first
    dq = _dq_blocks(
        dq, q, dout, lse, delta, c, keys, clear, end, M, n, N, M - N, keep_ptr, mask_ptr,
        hide, window, softcap, CAUSAL, True, None, HEAD_DIM, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    dq_base, dq_step = packed_at(dq_ptr, b, h, row, rows, H, HEAD_DIM)
    store_rows(dq_base, dq * scale, start, N, dq_step, HEAD_DIM, BLOCK_Q, BLOCK_D)


@triton.jit
def _add_product(acc, a, b):
    """acc + a b; in float32 as a sum of sums, which is nearer the truth than one long sum."""
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _key_step(
    dk, dv, k, v, c, queries, lse_ptr, delta_ptr, out, start, N, j, J, ahead,
    keep_ptr, bias_ptr, hide, window, softcap,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk (before its factor scale) and dv of the keys j after BLOCK more queries of one head."""
    q_ptr, q_step, dout_ptr, dout_step = queries
    n = start + tl.arange(0, BLOCK)
    q = load_rows(q_ptr, start, N, q_step, HEAD_DIM, BLOCK, BLOCK_D)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries], so p is a left operand
    s, factor, slope = cap_scores(s, c, softcap)
    if MASKED:
        s, factor = mask_scores(
            s, factor, n[None, :], j[:, None], N, J, ahead, keep_ptr, bias_ptr, hide, window,
            CAUSAL,
        )  # fmt: skip
    p = tl.exp2(s * factor - _rows(lse_ptr, n, N)[None, :])
    dout = load_rows(dout_ptr, start, N, dout_step, HEAD_DIM, BLOCK, BLOCK_D)
    dv = _add_product(dv, p.to(dout.dtype), dout)
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + n, mask=n < N, other=0.0)
    else:
        o = load_rows(out[0], start, N, out[1], HEAD_DIM, BLOCK, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * o.to(tl.float32), 1)
    ds = p * (dp - delta[None, :]) * slope
    dk = _add_product(dk, ds.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=ANY_SIZE)
def dkv_kernel(
    dout_ptr, lse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, keep_ptr, mask_ptr, ends_q_ptr, ends_k_ptr,
    dk_ptr, dv_ptr,
    H, N, M, sequences, scale, window, softcap,
    dout_strides, q_strides, k_strides, v_strides, keep_strides, mask_strides,
    CAUSAL: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K tokens of one head, over every query head that reads it."""
    pid = tl.program_id(0)
    sample, b, h_kv, start = row_block(pid, ends_k_ptr, sequences, M, H // GROUPS, False, BLOCK_K)
    rows, key_rows = N, M
    row, N = span(ends_q_ptr, sample, N)
    key_row, M = span(ends_k_ptr, sample, M)
    if ends_q_ptr is not None:  # noqa: SIM102
        if start >= M:
            return
    j = start + tl.arange(0, BLOCK_K)
    k_base, k_step = head_at(k_ptr, b, h_kv, key_row, k_strides, UNIT, STEP)
    v_base, v_step = head_at(v_ptr, b, h_kv, key_row, v_strides, UNIT, STEP)
    k = load_rows(k_base, start, M, k_step, HEAD_DIM, BLOCK_K, BLOCK_D)
    v = load_rows(v_base, start, M, v_step, HEAD_DIM, BLOCK_K, BLOCK_D)
    c, k = in_base2(scale, k)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)

    # queries below `first` see none of these keys, from `clear` on all, from `last` on none again
    masked: tl.constexpr = keep_ptr is not None or mask_ptr is not None or window is not None
    first = 0
    last = N
    clear = N if masked else 0
    if CAUSAL:
        first = tl.maximum(start - (M - N), 0) // BLOCK_Q * BLOCK_Q
        if not masked:
            clear = tl.cdiv(tl.maximum(start + BLOCK_K - 1 - (M - N), 0), BLOCK_Q) * BLOCK_Q
            clear = tl.minimum(clear, tl.cdiv(N, BLOCK_Q) * BLOCK_Q)
    if window is not None:
        last = tl.minimum(start + BLOCK_K - 1 - (M - N) + window, N)
        clear = last
        if not CAUSAL:
            first = tl.maximum(start - (M - N) - window + 1, 0) // BLOCK_Q * BLOCK_Q
    for g in range(GROUPS):
        h = h_kv * GROUPS + g
        at_lse = (b * H + h) * rows + row
        queries = pair_at(q_ptr, dout_ptr, b, h, row, q_strides, dout_strides, UNIT, STEP)
        hide = hide_at(b, h, keep_strides, mask_strides)
        if CAUSAL or masked:
            for at in tl.range(first, clear, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, c, queries, lse_ptr + at_lse, delta_ptr + at_lse, None,
                    at, N, j, M, M - N, keep_ptr, mask_ptr, hide, window, softcap,
                    CAUSAL, True, HEAD_DIM, BLOCK_Q, BLOCK_D,
                )  # fmt: skip
        if not masked:
            for at in tl.range(clear, last, BLOCK_Q):
                dk, dv = _key_step(
                    dk, dv, k, v, c, queries, lse_ptr + at_lse, delta_ptr + at_lse, None,
                    at, N, j, M, M - N, keep_ptr, mask_ptr, hide, window, softcap,
                    False, False, HEAD_DIM, BLOCK_Q, BLOCK_D,
                )  # fmt: skip

    dk_base, step = packed_at(dk_ptr, b, h_kv, key_row, key_rows, H // GROUPS, HEAD_DIM)
    dv_base, step = packed_at(dv_ptr, b, h_kv, key_row, key_rows, H // GROUPS, HEAD_DIM)
    store_rows(dk_base, dk * scale, start, M, step, HEAD_DIM, BLOCK_K, BLOCK_D)
    store_rows(dv_base, dv, start, M, step, HEAD_DIM, BLOCK_K, BLOCK_D)


@triton.jit(do_not_specialize=(*ANY_SIZE, "sets", "items", "per_split", "samples", "row_splits"))
def prompts_kernel(
    dout_ptr, out_ptr, lse_ptr, delta_ptr, q_ptr, pk_ptr, pv_ptr, bias_ptr,
    ends_q_ptr, index_ptr, length_ptr,
    dpk_ptr, dpv_ptr,
    H, N, P, sets, scale, softcap, splits, items, per_split, samples, row_splits,
    dout_strides, out_strides, q_strides, pk_strides, pv_strides, bias_strides,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split's share of the prompts' dk and dv: dpk, dpv [splits, sets, Hkv, P, HEAD_DIM].

    One set for all: the items to share out are the query blocks of all samples and of the heads
    of one group. Several: they are the samples that have this set and the heads of one group; each
    one's query blocks are shared out among `row_splits` more, that take turns at being the first.
    """
    heads = H // GROUPS
    p_blocks = tl.cdiv(P, BLOCK_P)
    start = tl.program_id(0) % p_blocks * BLOCK_P
    split = tl.program_id(0) // p_blocks % splits
    which_h = (tl.program_id(0) // p_blocks // splits).to(tl.int64)
    which, h_kv = which_h // heads, which_h % heads
    length = P
    if length_ptr is not None:
        length = tl.load(length_ptr + which).to(tl.int32)
    j = start + tl.arange(0, BLOCK_P)
    k_base, k_step = head_at(pk_ptr, which, h_kv, 0, pk_strides, UNIT, STEP)
    v_base, v_step = head_at(pv_ptr, which, h_kv, 0, pv_strides, UNIT, STEP)
    k = load_rows(k_base, start, length, k_step, HEAD_DIM, BLOCK_P, BLOCK_D)
    v = load_rows(v_base, start, length, v_step, HEAD_DIM, BLOCK_P, BLOCK_D)
    c, k = in_base2(scale, k)
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    masked: tl.constexpr = bias_ptr is not None or length_ptr is not None

    if index_ptr is None:
        blocks = tl.cdiv(N, BLOCK_Q)
        for item in tl.range(split * per_split, tl.minimum((split + 1) * per_split, items)):
            b = (item // blocks // GROUPS).to(tl.int64)
            h = h_kv * GROUPS + item // blocks % GROUPS
            at_lse = (b * H + h) * N
            delta = None if delta_ptr is None else delta_ptr + at_lse
            queries = pair_at(q_ptr, dout_ptr, b, h, 0, q_strides, dout_strides, UNIT, STEP)
            out = head_at(out_ptr, b, h, 0, out_strides, UNIT, STEP)
            hide = hide_at(b, h, (0, 0), bias_strides)
            dk, dv = _key_step(
                dk, dv, k, v, c, queries, lse_ptr + at_lse, delta, out,
                item % blocks * BLOCK_Q, N, j, length, 0, None, bias_ptr, hide, None, softcap,
                False, masked, HEAD_DIM, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
    else:
        for first in tl.range(0, samples, 128):
            i = first + tl.arange(0, 128)
            mine = tl.load(index_ptr + i, mask=i < samples, other=-1) == which
            place = tl.cumsum(mine.to(tl.int32), 0) - 1
            count = tl.sum(mine.to(tl.int32), 0)
            for item in tl.range(split // row_splits, count * GROUPS, splits // row_splits):
                here = mine & (place == item // GROUPS)
                sample = tl.sum(tl.where(here, i, 0), 0).to(tl.int64)
                h = h_kv * GROUPS + item % GROUPS
                row, rows = span(ends_q_ptr, sample, N)
                b = sample
                if ends_q_ptr is not None:
                    b = tl.full((), 0, tl.int64)
                at_lse = (b * H + h) * N + row
                delta = None if delta_ptr is None else delta_ptr + at_lse
                queries = pair_at(q_ptr, dout_ptr, b, h, row, q_strides, dout_strides, UNIT, STEP)
                out = head_at(out_ptr, b, h, row, out_strides, UNIT, STEP)
                hide = hide_at(b, h, (0, 0), bias_strides)
                turn = (split + item) % row_splits
                for at in tl.range(turn * BLOCK_Q, rows, row_splits * BLOCK_Q):
                    dk, dv = _key_step(
                        dk, dv, k, v, c, queries, lse_ptr + at_lse, delta, out,
                        at, rows, j, length, 0, None, bias_ptr, hide, None, softcap,
                        False, masked, HEAD_DIM, BLOCK_Q, BLOCK_D,
                    )  # fmt: skip

    to = (split * sets + which) * (heads * P * HEAD_DIM) + h_kv * (P * HEAD_DIM)
    store_rows(dpk_ptr + to, dk * scale, start, P, HEAD_DIM, HEAD_DIM, BLOCK_P, BLOCK_D)
    store_rows(dpv_ptr + to, dv, start, P, HEAD_DIM, HEAD_DIM, BLOCK_P, BLOCK_D)


@triton.jit(do_not_specialize=("size", "splits"))
def sum_kernel(partial_ptr, dpk_ptr, dpv_ptr, size, splits, BLOCK: tl.constexpr):
    """dpk, dpv [size] = partial [2, splits, size] summed over the splits, in their order."""
    blocks = tl.cdiv(size, BLOCK)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(0) // blocks
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(splits):
        share = partial_ptr + (which * splits + split).to(tl.int64) * size
        acc += tl.load(share + at, mask=at < size, other=0.0)
    if which == 0:
        tl.store(dpk_ptr + at, acc.to(dpk_ptr.dtype.element_ty), mask=at < size)
    else:
        tl.store(dpv_ptr + at, acc.to(dpv_ptr.dtype.element_ty), mask=at < size)
