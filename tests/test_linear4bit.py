"""Our product behind bitsandbytes' Linear4bit: the same module, and a way back."""

import copy
import pickle
from importlib import import_module

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from compare import assert_as_accurate
from torch import nn

from fastprompt import linear4bit, native


@pytest.fixture
def decoding(monkeypatch):
    """What csrc/ multiplies without decoding has other roundings than bitsandbytes."""
    monkeypatch.setattr(import_module("fastprompt.ops.nf4_linear"), "FUSED", ())


bit_for_bit = pytest.mark.usefixtures("decoding")


def linear(rows=128, columns=192, compute=torch.float32, dtype=torch.float32, **kw):
    torch.manual_seed(0)
    module = Linear4bit(columns, rows, quant_type="nf4", compute_dtype=compute, **kw).to(dtype)
    module = module.to("cpu").requires_grad_(False)
    # bitsandbytes' own repacking only where a test is about it
    module.support_avx512bf16_for_cpu = False
    return module


def both(f, x, dy):
    y = f(x)
    return y, torch.autograd.grad(y, x, dy)[0]


@bit_for_bit
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_adopted_is_bitsandbytes_bit_for_bit(compute, dtype, bias):
    theirs, ours = (linear(compute=compute, bias=bias) for _ in range(2))
    assert linear4bit.adopt(ours) == {"": ours}
    x, dy = torch.randn(2, 5, 192).to(dtype).requires_grad_(), torch.randn(2, 5, 128).to(dtype)
    for got, want in zip(both(ours, x, dy), both(theirs, x, dy), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@bit_for_bit
def test_adopted_under_autocast():
    theirs, ours = linear(), linear()
    linear4bit.adopt(ours)
    x, dy = torch.randn(5, 192, requires_grad=True), torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = both(ours, x, dy), both(theirs, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(native.isa() not in ("avx512", "avx2", "neon"), reason="csrc decodes here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_straight_from_the_4_bits(dtype, monkeypatch):
    """Four tokens: csrc multiplies both ways, as accurately as a dense product."""
    module, called, product = linear(compute=dtype, dtype=dtype), [], native.product_4bit
    dense = bnb.dequantize_4bit(module.weight, module.weight.quant_state).float()
    linear4bit.adopt(module)

    def counted(*args, **kw):
        called.append(kw["backward"])
        return product(*args, **kw)

    monkeypatch.setattr(native, "product_4bit", counted)

    def eager(x):
        return nn.functional.linear(x, dense.to(x.dtype), module.bias.to(x.dtype))

    x = torch.randn(2, 2, 192).to(dtype).requires_grad_()
    assert_as_accurate(module, eager, (x,), torch.randn(2, 2, 128))
    assert called == [False, True]


@bit_for_bit
def test_gradients_after_an_eval_forward_are_right():
    """bitsandbytes repacks the weight in its first eval forward on CPUs with AVX512-BF16."""
    model, x = nn.Sequential(linear(), nn.ReLU(), linear(64, 128)), torch.randn(4, 192)
    for module in (model[0], model[2]):
        module.support_avx512bf16_for_cpu = True  # as on such a CPU
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x.requires_grad_()
    want = both(model.train(), x, torch.ones(4, 64))
    linear4bit.adopt(model)
    with torch.no_grad():
        model.eval()(x.detach())
    got = both(model, x, torch.ones(4, 64))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)


@pytest.mark.skipif(not bnb.has_avx512bf16(), reason="only on CPUs with AVX512-BF16")
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_bitsandbytes_alone_is_still_wrong():
    """Why the above exists. If this fails, bitsandbytes has been mended and the guard can go."""
    module, x = linear(columns=128, bias=False), torch.randn(4, 128, requires_grad=True)
    dy = torch.ones(4, 128)
    want = both(lambda x: x + module(x), x, dy)[1]
    module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        module.eval()(x.detach())
    got = both(lambda x: x + module(x), x, dy)[1]
    assert torch.equal(got, dy) and not torch.allclose(want, dy)  # only the residual's gradient


def repack(module):
    module.weight.data, _ = bnb._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )


@bit_for_bit
@pytest.mark.parametrize("saved_since", [False, True])
def test_repacked_weights_are_restored_where_nothing_was_lost(saved_since):
    module = linear(dtype=torch.bfloat16, compress_statistics=False)
    packed, absmax = module.weight.data.clone(), module.weight.quant_state.absmax.clone()
    repack(module)
    if saved_since:
        module.state_dict()  # bitsandbytes' own way back, which leaves the scales transposed
    linear4bit.adopt(module)
    assert torch.equal(module.weight.data, packed)
    assert torch.equal(module.weight.quant_state.absmax, absmax)
    untouched = linear(dtype=torch.bfloat16, compress_statistics=False)
    assert torch.equal(module(torch.ones(2, 192)), untouched(torch.ones(2, 192)))


@pytest.mark.parametrize(
    "kw", [dict(), dict(dtype=torch.bfloat16), dict(compress_statistics=False)]
)
@pytest.mark.parametrize("saved_since", [False, True])
def test_repacked_weights_are_refused_where_precision_was_lost(kw, saved_since):
    model = nn.Sequential(linear(), linear(64, 128, **kw))
    repack(model[1])
    if saved_since:
        model.state_dict()
    with pytest.raises(ValueError, match=r"first is '1'.*load the model again"):
        linear4bit.adopt(model)
    assert "forward" not in vars(model[0])


def test_release_gives_the_old_module_back():
    model = nn.Sequential(linear(compute=None), nn.ReLU(), linear(64, 128))
    x = torch.randn(4, 192, requires_grad=True)
    before = [dict(vars(m)) for m in model.modules()]
    adopted = linear4bit.adopt(model)
    assert list(adopted) == ["0", "2"] and linear4bit.adopt(model) == {}
    model(x.half())  # fixes a compute dtype, for as long as it is adopted
    linear4bit.release(adopted)
    assert [dict(vars(m)) for m in model.modules()] == before
    fresh = nn.Sequential(linear(compute=None), nn.ReLU(), linear(64, 128))
    for mode in (True, False):
        got, want = (both(m.train(mode), x, torch.ones(4, 64)) for m in (model, fresh))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_adopted_and_their_own(copied):
    model = nn.Sequential(linear())
    linear4bit.adopt(model)
    x = torch.randn(2, 192)
    want = model(x)
    other = copied(model)
    assert isinstance(other[0].forward, linear4bit.Product)
    assert other[0].forward.module is other[0]
    assert torch.equal(other(x), want)
    other[0].weight.data.zero_()
    assert not torch.equal(other(x), want) and torch.equal(model(x), want)
    linear4bit.release({"0": other[0]})
    assert "forward" not in vars(other[0]) and "forward" in vars(model[0])


def test_hooks_run():
    module, seen = linear(), []
    linear4bit.adopt(module)
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module(torch.ones(1, 192))
    assert seen == ["before", "after"]


@bit_for_bit
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("hook_stays", [True, False])
def test_accelerates_hooks(hooked_first, hook_stays):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Double(ModelHook):
        def pre_forward(self, module, x):
            return (2 * x,), {}

    module, x = linear(bias=False), torch.randn(3, 192)
    want = module(2 * x)
    for step in ("hook", "adopt") if hooked_first else ("adopt", "hook"):
        adopted = (
            add_hook_to_module(module, Double()) if step == "hook" else linear4bit.adopt(module)
        )
    assert isinstance(module._old_forward, linear4bit.Product)
    assert torch.equal(module(x), want)
    if not hook_stays:
        remove_hook_from_module(module)
        assert isinstance(module.forward, linear4bit.Product)
    linear4bit.release([module])
    assert not any(isinstance(v, linear4bit.Product) for v in vars(module).values())
    assert torch.equal(module(x if hook_stays else 2 * x), want)
    del adopted


def test_other_devices_and_foreign_forwards_are_left_alone(monkeypatch):
    ours, foreign = linear(), linear()
    foreign.forward = lambda x: x
    assert linear4bit.adopt(nn.ModuleDict({"a": ours, "b": foreign})) == {"a": ours}
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: ("class", x.device.type))
    assert ours(torch.empty(2, 192, device="meta")) == ("class", "meta")


def test_a_trainable_bias_still_trains():
    theirs, ours = linear(), linear()
    linear4bit.adopt(ours)
    for module in (theirs, ours):
        module.bias.requires_grad_()
        module(torch.ones(3, 192)).sum().backward()
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@bit_for_bit
def test_state_kept_by_the_module_alone():
    """FSDP2 makes the weight a plain Parameter, without quant_state."""
    module, x = linear(), torch.randn(2, 192)
    want = module(x)
    linear4bit.adopt(module)
    module.weight = nn.Parameter(module.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(module(x), want)


def test_compiles_whole():
    module = linear()
    linear4bit.adopt(module)
    x, dy = torch.randn(4, 192, requires_grad=True), torch.randn(4, 128)
    compiled = torch.compile(lambda x: module(x.relu()).tanh(), fullgraph=True, backend="aot_eager")
    want = both(lambda x: module(x.relu()).tanh(), x, dy)
    assert all(torch.equal(a, b) for a, b in zip(both(compiled, x, dy), want, strict=True))
