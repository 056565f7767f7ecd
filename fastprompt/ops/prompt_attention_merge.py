"""`prompt_attention` as two parts: a vendor's attention over the tokens, and the prompts added.

The vendor's kernel gives its log-sum-exp, so that prompts can be added to its output afterwards
(`products`), and no concatenation is ever written. Backward, it is given the *merged* output and
log-sum-exp, from which it recomputes its probabilities, and so gives the tokens' exact share.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.ops import products, reference
from fastprompt.ops.layout import in_our_layout, rows_like
from fastprompt.ops.options import Options
from fastprompt.ops.vendors import Vendor

_ROWS = 512  # queries at once where a mask [queries, keys] must be written out


def forward(vendor: Vendor, q, k, v, prompt_k, prompt_v, o: Options) -> tuple[Tensor, Tensor]:
    """([B, Hq, N, d] laid out as [B, N, Hq, d], lse [B, Hq, N] float32, natural logarithm)."""
    B, H, N = q.shape[:3]
    pieces = list(_pieces(o, N, k.shape[2]))
    if _is_whole(pieces, q, k):
        out, lse = _attend(vendor, q, k, v, o, pieces[0])
        out = in_our_layout(out)
    else:
        out, lse = in_our_layout(q.new_zeros(q.shape)), _minus_infinity(q)
        for piece in pieces if k.numel() and q.numel() else ():
            own = (q[:, :, piece.queries], *(x[:, :, piece.keys] for x in (k, v)))
            out[:, :, piece.queries], lse[:, :, piece.queries] = _attend(vendor, *own, o, piece)
    lse = _heads_first(lse)
    for share in _shares(B, prompt_k.shape[-2], o):
        keys, values = share.of_heads(prompt_k, H), share.of_heads(prompt_v, H)
        query, *results = (share.rows(x) for x in (q, out, lse))
        products.attend(query, keys, values, *results, o.scale, o.softcap, share.bias)
    return out, lse.contiguous()


def backward(
    vendor: Vendor, dout, out, lse, q, k, v, prompt_k, prompt_v, o: Options, tokens, prompts
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dprompt_k, dprompt_v); empty tensors for what is not asked."""
    # a row that saw nothing has lse -inf; +inf makes every probability of it zero, not NaN
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    rows, shared, wanted = (dout, out, lse, q, k, v), (prompt_k, prompt_v), (tokens, prompts)
    own = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in shared]
    if not vendor.backward_in_float32 or q.dtype == torch.float32:
        grads = _backward(vendor, *rows, *shared, o, *wanted, own)
    else:
        # a few samples at a time: whole copies in float32 would double the memory
        grads = [rows_like(x) for x in (q, k, v)] if tokens else None
        shared = [p.float() for p in shared]
        for some in _batches(q):
            part = _backward(
                vendor, *(x[some].float() for x in rows), *shared, o.of(some), *wanted, own
            )
            for whole, few in zip(grads or (), part or (), strict=True):
                whole[some] = few
    grads = [in_our_layout(grads[i]) if tokens else q.new_empty(0) for i in range(3)]
    return *grads, *(g.to(q.dtype) if prompts else q.new_empty(0) for g in own)


def _backward(
    vendor, dout, out, lse, q, k, v, prompt_k, prompt_v, o, tokens, prompts, own
) -> list[Tensor] | None:
    """[dq, dk, dv], if asked; adds the prompts' gradients to ``own``."""
    H, grads = q.shape[1], None
    if tokens:
        grads = _tokens_gradients(vendor, dout, out, lse, q, k, v, o)
    if prompts or (tokens and prompt_k.numel()):
        lse, delta = _heads_first(lse), _heads_first((dout.float() * out).sum(-1))
        for share in _shares(q.shape[0], prompt_k.shape[-2], o):
            keys, values = share.of_heads(prompt_k, H), share.of_heads(prompt_v, H)
            rows = [share.rows(x) for x in (dout, q, lse, delta)]
            into = None if grads is None else share.rows(grads[0])
            given = products.gradients(
                rows[0], rows[1], keys, values, *rows[2:], into, o.scale, o.softcap, share.bias
            )
            for total, part in zip(own, given, strict=True):
                share.add(total, part)
    return grads


def _batches(q: Tensor) -> Iterator[slice]:
    """Samples that together have a head for every thread."""
    step = max(1, -(-torch.get_num_threads() // max(1, q.shape[1])))
    return (slice(b, b + step) for b in range(0, q.shape[0], step))


def _tokens_gradients(vendor, dout, out, lse, q, k, v, o):
    pieces = list(_pieces(o, q.shape[2], k.shape[2]))
    if _is_whole(pieces, q, k):
        dq, dk, dv = _gradients(vendor, dout, out, lse, q, k, v, o, pieces[0])
        return [in_our_layout(dq), dk, dv]
    dq, dk, dv = (in_our_layout(torch.zeros_like(x)) for x in (q, k, v))
    for piece in pieces if k.numel() and q.numel() else ():
        queries = (x[:, :, piece.queries] for x in (dout, out, lse, q))
        keys = (x[:, :, piece.keys] for x in (k, v))
        dq_part, dk_part, dv_part = _gradients(vendor, *queries, *keys, o, piece)
        dq[:, :, piece.queries] = dq_part
        dk[:, :, piece.keys] += dk_part  # windows overlap
        dv[:, :, piece.keys] += dv_part
    return [dq, dk, dv]


# ---- tokens: a piece of queries, and the keys that it may see ----


class _Piece(NamedTuple):
    queries: slice
    keys: slice
    ahead: int  # query n of the piece stands at its key n + ahead


def _pieces(o: Options, N: int, M: int) -> Iterator[_Piece]:
    """Packed sequences apart; where a mask must be written, some queries at a time."""
    ends = [o.cu_seqlens_q.tolist(), o.cu_seqlens_k.tolist()] if o.packed else [[0, N], [0, M]]
    for i in range(len(ends[0]) - 1):
        (q0, q1), (k0, k1) = (end[i : i + 2] for end in ends)
        ahead = (k1 - k0) - (q1 - q0)
        cached = o.causal and ahead > 0 and q1 - q0 > 1  # not the vendor's kind of causal
        if o.window is None and o.softcap is None and not cached:
            if not o.packed or (q1 > q0 and k1 > k0):
                yield _Piece(slice(q0, q1), slice(k0, k1), ahead)
            continue
        window = o.window or (q1 - q0) + (k1 - k0)  # further than any query is from any key
        step = min(_ROWS, max(128, window))
        for start in range(0, q1 - q0, step):
            stop = min(start + step, q1 - q0)
            first = max(0, start + ahead - window + 1)
            last = min(k1 - k0, stop + ahead + (0 if o.causal else window - 1))
            if last > first:
                at = slice(q0 + start, q0 + stop), slice(k0 + first, k0 + last)
                yield _Piece(*at, start + ahead - first)


def _is_whole(pieces: list[_Piece], q: Tensor, k: Tensor) -> bool:
    """Whether one call of the vendor's does it all, so that its results are ours as they are."""
    everything = (slice(0, q.shape[2]), slice(0, k.shape[2]))
    return [piece[:2] for piece in pieces] == [everything] and q.numel() > 0 and k.numel() > 0


def _attend(vendor, q, k, v, o, piece) -> tuple[Tensor, Tensor]:
    mask, causal = _vendor_mask(q, k, o, piece)
    if o.softcap is None:
        turned, scale, _ = _scaled_up(q, o.scale)
        out, lse = vendor.attend(turned, k, v, mask, causal, scale)
        hidden = _sees_nothing(q, k, mask, causal, o)
        if hidden is not None:  # vendors differ in what they answer there
            out, lse = (
                out.masked_fill(hidden[..., None], 0.0),
                lse.masked_fill(hidden, -torch.inf),
            )
        return out, lse
    out, lse = in_our_layout(q.new_zeros(q.shape)), _minus_infinity(q)
    for b in range(q.shape[0]):
        keys, values = (_repeated(x[b], q.shape[1]) for x in (k, v))
        bias = None if mask is None else mask[b if mask.shape[0] > 1 else 0]
        products.attend(q[b], keys, values, out[b], lse[b], o.scale, o.softcap, bias)
    return out, lse


def _gradients(vendor, dout, out, lse, q, k, v, o, piece):
    mask, causal = _vendor_mask(q, k, o, piece)
    if o.softcap is None:
        turned, scale, sign = _scaled_up(q, o.scale)
        dq, dk, dv = vendor.gradients(dout, turned, k, v, out, lse, mask, causal, scale)
        return dq if sign == 1 else dq * sign, dk, dv
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    delta = (dout.float() * out).sum(-1)
    for b in range(q.shape[0]):
        keys, values = (_repeated(x[b], q.shape[1]) for x in (k, v))
        bias = None if mask is None else mask[b if mask.shape[0] > 1 else 0]
        given = products.gradients(
            dout[b], q[b], keys, values, lse[b], delta[b], dq[b], o.scale, o.softcap, bias
        )
        for total, part in zip((dk, dv), given, strict=True):
            total[b] = part.unflatten(0, (k.shape[1], -1)).sum(1)
    return dq, dk, dv


def _scaled_up(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q times the sign of scale, a scale above 0, that sign).

    Vendors hide with -inf before they multiply: a scale below 0 would show it, 0 give NaN.
    """
    if scale > 0:
        return q, scale, 1
    return (-q, -scale, -1) if scale < 0 else (torch.zeros_like(q), 1.0, 0)


def _vendor_mask(q, k, o: Options, piece) -> tuple[Tensor | None, bool]:
    """The vendor's additive mask and its causal flag, which is aligned at the *first* key."""
    N, M = q.shape[2], k.shape[2]
    # one query, at the last key, sees everything
    causal = o.causal and not (N == 1 and piece.ahead == M - 1)
    top_left = causal and N == M and piece.ahead == 0 and o.window is None and o.softcap is None
    if o.attn_mask is None and o.window is None and causal == top_left:
        if o.key_mask is None:
            return None, top_left
        seen = o.key_mask[:, piece.keys]
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        return mask.masked_fill_(~seen, -torch.inf)[:, None, None, :], top_left
    key_mask = None if o.key_mask is None else o.key_mask[:, piece.keys]
    attn_mask = None if o.attn_mask is None else o.attn_mask[:, :, piece.queries, piece.keys]
    options = dict(causal=causal, key_mask=key_mask, attn_mask=attn_mask, window=o.window)
    return reference.additive_mask(N, M, q, ahead=piece.ahead, **options), False


def _sees_nothing(q, k, mask, top_left, o) -> Tensor | None:
    """Rows [B or 1, H or 1, N] to which every token is hidden."""
    if mask is None:
        return None
    if top_left:  # only key_mask beside causality: nothing seen before the first unmasked key
        return (o.key_mask.cumsum(-1) == 0)[:, None, :]
    return (mask == -torch.inf).all(-1)


# ---- prompts: a set of them, and the rows that see it ----


class _Share(NamedTuple):
    rows: Callable[[Tensor], Tensor]  # [B, H, N, ...] -> a view [H, n, ...]
    which: int | None  # of the sets; None: the only one
    length: int
    bias: Tensor | None  # [H or 1, n, P]

    def of_heads(self, prompts: Tensor, H: int) -> Tensor:
        """[H, P, d], each key head repeated for its query heads."""
        own = prompts if self.which is None else prompts[self.which]
        return _repeated(own[:, : self.length], H)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Adds ``part`` [H, P, d] to the gradients [Hkv, P, d] of its set."""
        total = total if self.which is None else total[self.which]
        total[:, : self.length] += part.unflatten(0, (total.shape[0], -1)).sum(1)


def _shares(B: int, P: int, o: Options) -> Iterator[_Share]:
    """One for the whole batch where it can be; else one for each sample or packed sequence."""
    if o.prompt_index is None and o.prompt_bias is None:
        yield _Share(lambda x: x.transpose(0, 1).flatten(1, 2), None, P, None)
        return
    if o.prompt_bias is not None:
        # whoever writes the lowest number means hidden
        lowest = o.prompt_bias <= torch.finfo(o.prompt_bias.dtype).min
        o = o._replace(prompt_bias=o.prompt_bias.masked_fill(lowest, -torch.inf))
    ends = o.cu_seqlens_q.tolist() if o.packed else None
    which = None if o.prompt_index is None else o.prompt_index.tolist()
    lengths = None if o.prompt_len is None else o.prompt_len.tolist()
    for i in range(B if ends is None else len(ends) - 1):
        b, n = (i, slice(None)) if ends is None else (0, slice(ends[i], ends[i + 1]))
        of = None if which is None else which[i]
        length, bias = P if lengths is None else lengths[of], o.prompt_bias
        if bias is not None:
            bias = bias[b if len(bias) > 1 else 0, ..., :length].float()
        yield _Share(lambda x, b=b, n=n: x[b, :, n], of, length, bias)


# ---- shapes ----


def _repeated(x: Tensor, H: int) -> Tensor:
    """[Hkv, J, d] -> [H, J, d]."""
    return x if len(x) == H else x.repeat_interleave(H // len(x), dim=0)


def _heads_first(x: Tensor) -> Tensor:
    """[B, H, N] in [H, B, N] memory, so that a head's rows of all samples lie in line."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _minus_infinity(q: Tensor) -> Tensor:
    return torch.full(q.shape[:3], -torch.inf, device=q.device)
