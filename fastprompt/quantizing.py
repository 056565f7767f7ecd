"""4-bit weights for models that transformers' loader does not serve: timm's, open_clip's, your own.

One weight after another is read, quantised by bitsandbytes and let go. So with weights from a file
there is never more than the 4-bit model and one weight on its way into it; with weights in memory,
there are also those whose turn has not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprompt import linear4bit
from fastprompt.families.base import join
from fastprompt.importers.shards import Shards
from fastprompt.multihead import MultiheadAttention
from fastprompt.ops.packed import KINDS

# small, and trained or loaded from elsewhere, so not worth an error of 9%
DENSE = ("lm_head", "head", "head_dist", "classifier", "score", "patch_embed")
DENSE += ("attn_pool", "attnpool")  # open_clip's ResNets' reads its layers' weights as numbers
DENSE += ("projector", "multi_modal_projector", "connector", "merger")
DENSE += ("text_projection", "visual_projection")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of weights
_SLICE = 2**16  # weights
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'


class _Format(NamedTuple):
    quant_type: str
    blocksize: int
    nested: bool
    dtype: torch.dtype | None  # of products, and of all that stays dense
    device: torch.device


def quantize_(
    model: nn.Module,
    *,
    weights: str | Path | None = None,
    skip: Iterable[str] = (),
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace a model's linear layers by bitsandbytes' 4-bit ones, in place.

    ``nn.MultiheadAttention`` becomes `fastprompt.multihead.MultiheadAttention`, which is called as
    before and whose ``in_proj`` and ``out_proj`` are 4-bit layers. Linear layers and attentions
    with a forward of their own stay dense. A module of yours that reads the ``weight`` of a layer
    in it as numbers, rather than call the layer, cannot be told from others: name it in ``skip``.

    A 4-bit state dict cannot be loaded again: keep the dense file, and make the model anew from it,
    which gives the same bits. `fastprompt.save` and `load` keep what is trained, as for any model.

    Args:
        model: of timm, open_clip or your own, of float32, float16 or bfloat16 weights. With
            ``weights`` its own do not matter: build it under ``accelerate.init_empty_weights()``
            and it has none. Models of transformers are loaded in 4-bit by transformers.
        weights: a file of the model's ``state_dict()`` (safetensors, or of ``torch.save``) or a
            folder of one. What it holds beside the model's tensors is not read.
        skip: names of modules that stay dense, with all inside, beside `DENSE`: whole parts of a
            dotted name, so that "mlp.fc2" is that of each block.
        quant_type: "nf4" or "fp4" (arXiv 2305.14314).
        blocksize: weights that share a scale: 32, 64, ... 4096.
        nested: scales are quantised as well, to 8 bits.
        dtype: of what stays dense, and of 4-bit layers' products. None: as it is.
        device: where all goes. None: where the model is; the CPU, if it has no weights.

    Returns:
        The same model.

    Raises:
        ValueError: a model of transformers, one that is patched or quantised, no linear layer, a
            name that no module has, weights that are missing or of another shape or dtype. The
            model is then as it was, unless it was a file that turned out damaged on the way, or
            its dtype.
    """
    if quant_type not in KINDS:
        raise ValueError(f"quant_type: want one of {', '.join(KINDS)}; got {quant_type!r}")
    if blocksize not in _BLOCKSIZES:
        raise ValueError(f"blocksize: want one of {_BLOCKSIZES}, got {blocksize!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: want a floating-point one, got {dtype}")
    _check_model(model)
    chosen = _chosen(model, tuple(skip))
    shards = None if weights is None else Shards.at(weights)
    _check_weights(model, shards, chosen)
    has = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    like = _Format(quant_type, blocksize, nested, dtype, torch.device(device or has))

    def read(name: str, own: Tensor, stays: bool) -> Tensor:
        if shards is None:
            found, copy = own.detach(), False
        else:  # what stays is copied, or it would keep the file mapped into memory
            found, copy = shards.read([name])[name], stays
        dtype = like.dtype if like.dtype and stays and found.is_floating_point() else found.dtype
        return found.to(like.device, dtype, copy=copy)

    made: _Made = {}
    for name in [name for name, _ in model.named_modules()]:
        if name in chosen:
            new = _quantised(model.get_submodule(name), name, read, like, made)
            for each in chosen[name]:
                model.set_submodule(each, new)
        elif not any(name.startswith(f"{each}.") for each in chosen):  # gone with their attention
            _fill(model.get_submodule(name), name, read, like, made)
    for name in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("qkv") and hasattr(parent, "qkv_bias_separate"):
            parent.qkv_bias_separate = True  # or timm's EVA and BEiT read the weight as numbers
    linear4bit.adopt(model)
    model.register_load_state_dict_pre_hook(_not_loaded)
    return model


# ---- what is asked for ----


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{kind}: want a model outside transformers; load this one by from_pretrained(…, "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True))"
        )
    for name, module in model.named_modules():
        if "_fastprompt_patch" in vars(module):
            raise ValueError(f"{kind}: {name or 'it'} is patched: quantise first, then patch")
        if type(module).__module__.startswith("bitsandbytes."):
            raise ValueError(f"{kind}: {name} is quantised already ({type(module).__name__})")
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            raise ValueError(
                f"{kind}: {name or 'it'} is a {type(module).__name__}, whose native code reads "
                "weights as numbers"
            )


def _chosen(model: nn.Module, skip: tuple[str, ...]) -> dict[str, list[str]]:
    """Layers and attentions to be quantised: the first name of each -> all that it has."""
    names = dict(model.named_modules(remove_duplicate=False))
    having: dict[int, list[str]] = {}
    for name, module in names.items():
        having.setdefault(id(module), []).append(name)
    for each in skip:
        if not any(_within(name, each) for name in names):
            raise ValueError(f"skip: want names of modules of the model, got {each!r}")
    attentions = [n for n, m in names.items() if isinstance(m, nn.MultiheadAttention)]
    chosen = {
        own[0]: own
        for own in having.values()
        if own[0]
        and not any(_within(name, each) for name in own for each in (*DENSE, *skip))
        and not any(name.startswith(f"{each}.") for name in own for each in attentions)
        and _serves(names[own[0]])
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}: want linear layers to quantise, found none outside "
            f"{', '.join((*skip, *DENSE))}"
        )
    return chosen


def _within(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _serves(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return (
            type(module).forward is nn.MultiheadAttention.forward
            and module.in_proj_weight is not None
            and module.bias_k is None
            and not module.add_zero_attn
        )
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _check_weights(model: nn.Module, shards: Shards | None, chosen: Iterable[str]) -> None:
    tensors = model.state_dict(keep_vars=True)
    kept = {id(t) for t in tensors.values()}
    unread = [n for n, b in model.named_buffers() if b.is_meta and id(b) not in kept]
    if unread:
        raise ValueError(
            f"{unread[0]}: want buffers with values, which no file has; got one on the meta device "
            f"({len(unread)} are): build the model under accelerate.init_empty_weights()"
        )
    if shards is None:
        empty = [name for name, tensor in tensors.items() if tensor.is_meta]
        if empty:
            raise ValueError(f"{empty[0]}: want weights=, got a model on the meta device")
        for name in chosen:
            for key, weight in model.get_submodule(name).named_parameters():
                if weight.dtype not in _DTYPES:
                    raise ValueError(
                        f"{name}.{key}: want one of {_DTYPES} to quantise, got {weight.dtype}"
                    )
        return
    for name, shape in shards.shapes(list(tensors)).items():
        if shape != tensors[name].shape:
            raise ValueError(
                f"{shards.path}: {name}: want {list(tensors[name].shape)}, got {list(shape)}"
            )


def _not_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest) -> None:
    """Before ``load_state_dict``: 4-bit weights are not written over."""
    from bitsandbytes.nn import Linear4bit

    own = (f"{prefix}{n}.weight" for n, m in module.named_modules() if isinstance(m, Linear4bit))
    found = next((name for name in own if name in state), None)
    if found is not None:
        raise ValueError(
            f"{found}: want no weights of 4-bit layers, which cannot be loaded: build the model "
            "anew and quantize_(model, weights=…) from the dense file"
        )


# ---- making ----

_Read = Callable[[str, Tensor, bool], Tensor]  # name, the model's own, whether it stays dense
# id of a parameter -> itself, so that no other gets its id, and what it became: several modules
# may share one
_Made = dict[int, tuple[nn.Parameter, nn.Parameter]]


def _quantised(old: nn.Module, name: str, read: _Read, like: _Format, made: _Made) -> nn.Module:
    if not isinstance(old, nn.MultiheadAttention):
        return _linear(f"{name}.", old.weight, old.bias, read, like, made).train(old.training)
    in_proj = _linear(f"{name}.in_proj_", old.in_proj_weight, old.in_proj_bias, read, like, made)
    out_proj = old.out_proj
    out_proj = _linear(f"{name}.out_proj.", out_proj.weight, out_proj.bias, read, like, made)
    return MultiheadAttention(old, in_proj, out_proj)


def _linear(
    prefix: str, weight: Tensor, bias: Tensor | None, read: _Read, like: _Format, made: _Made
) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        weight.shape[1], weight.shape[0], bias is not None, like.dtype, like.nested,
        like.quant_type, device="meta",
    )  # fmt: skip
    dense = read(f"{prefix}weight", weight, False)
    # open_clip casts to the dtype of such a weight, and asks here for what it was
    new.int8_original_dtype = like.dtype or dense.dtype
    packed, new.quant_state = _packed(dense, like)
    new.weight = Params4bit(
        packed, False, new.quant_state, like.blocksize, like.nested, like.quant_type,
        module=new, bnb_quantized=True,
    )  # fmt: skip
    if bias is not None:
        new.bias = _kept(bias, f"{prefix}bias", read, made)
    return new


def _packed(dense: Tensor, like: _Format) -> tuple[Tensor, Any]:
    """Bit for bit what ``bitsandbytes.functional.quantize_4bit`` makes of the whole weight.

    By slices of rows with whole blocks, since on the CPU it takes 16 bytes a weight on its way.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    rows = max(1, _SLICE // (dense.shape[1] * like.blocksize)) * like.blocksize
    dtype = torch.float32 if dense.dtype == torch.float64 else dense.dtype  # it takes no float64
    parts = [
        quantize_4bit(part.to(dtype), blocksize=like.blocksize, quant_type=like.quant_type)
        for part in dense.split(rows)
    ]
    state = parts[0][1]
    state.shape, state.absmax = dense.shape, torch.cat([part.absmax for _, part in parts])
    if like.nested:
        state.nested, state.offset = True, state.absmax.mean()
        scales = state.absmax - state.offset
        state.absmax, state.state2 = quantize_blockwise(scales, blocksize=256)
    return torch.cat([packed for packed, _ in parts]), state


def _kept(old: nn.Parameter, name: str, read: _Read, made: _Made) -> nn.Parameter:
    """What becomes of a parameter that stays dense."""
    if id(old) not in made:
        found = read(name, old, True)
        new = nn.Parameter(found, old.requires_grad) if old.is_meta else old
        new.data = found
        made[id(old)] = old, new
    return made[id(old)][1]


def _fill(module: nn.Module, name: str, read: _Read, like: _Format, made: _Made) -> None:
    """Put a module's own dense tensors where and into what they are to be."""
    for key, old in list(module._parameters.items()):
        if old is not None:
            module._parameters[key] = _kept(old, join(name, key), read, made)
    for key, old in list(module._buffers.items()):
        if old is None:
            continue
        if key in module._non_persistent_buffers_set:  # in no file
            module._buffers[key] = old.to(
                like.device, like.dtype if old.is_floating_point() else None
            )
        else:
            module._buffers[key] = read(join(name, key), old, True)
