"""csrc/cuda's products of few tokens: the kernels themselves, run on the host by tests/emulator or
on a GPU; what is launched for which weight."""

import copy
import importlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate
from nf4_cuda import SANITIZE, Emulated, build_emulator, dense, exact, integers

from fastprompt import linear4bit, native_cuda, reporting
from fastprompt.blocks import products
from fastprompt.ops import nf4_linear_cuda as cuda
from fastprompt.ops.nf4_linear import nf4_linear

op = importlib.import_module("fastprompt.ops.nf4_linear")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=needs_compiler),
        pytest.param("backwards", marks=needs_compiler),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def card(request, monkeypatch):
    """A device that the kernels run on: the emulator's, its threads in both orders, or a GPU."""
    if request.param == "gpu":
        if why := cuda.why_not(GPU):
            pytest.skip(why)
        return GPU
    emulated = Emulated(request.getfixturevalue("library"))
    emulated.backwards = request.param == "backwards"
    emulated.install(monkeypatch)
    return CPU


def same(got, want):
    """Every bit; `want` is exact in float64."""
    assert torch.equal(got.double(), want.to(got.dtype).double())


def check(w, tokens, dtype, device, biased=False):
    x = integers(tokens, w.columns, dtype=dtype, device=device)
    bias = integers(w.rows, dtype=dtype, device=device, seed=2) if biased else None
    assert cuda.serves_forward(tokens, dtype, w)
    y = cuda.forward(x, w, bias)
    same(y, F.linear(x.double(), dense(w), None if bias is None else bias.double()))
    if dtype == BF16:
        dy = integers(tokens, w.rows, dtype=dtype, device=device, seed=3)
        assert cuda.serves_backward(tokens, dtype, w)
        same(cuda.backward(dy, w), dy.double() @ dense(w))


@pytest.fixture
def unit_gain(monkeypatch):
    monkeypatch.setattr(cuda, "GAINS", {"nf4": 1.0})


@pytest.fixture
def nan_filled(monkeypatch):
    """What is not written is seen."""
    made = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, *size, **kw: made(t, *size, **kw).fill_(torch.nan)
    )


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_kernel(card, unit_gain, nan_filled, tokens, dtype):
    check(
        exact(128, 320, 64, tokens % 2 == 0, 0, card), tokens, dtype, card, biased=tokens % 2 == 1
    )


@pytest.mark.parametrize("seed", range(16))
def test_sizes_and_blocks(card, unit_gain, nan_filled, seed):
    rng = random.Random(seed)
    rows, columns = 64 * rng.randint(1, 5), 64 * rng.choice([1, 2, 3, 4, 5, 9, 17, 33])
    if rows * columns > 200_000:
        rows = 64
    blocksize = rng.choice([64, 64, 128, 256, 1024, 4096])
    w = exact(rows, columns, blocksize, rng.random() < 0.5, seed, card)
    check(w, rng.randint(1, 64), BF16, card, biased=rng.random() < 0.5)


@pytest.mark.parametrize("processors", [1, 2, 100])
def test_warps_side_by_side(card, unit_gain, nan_filled, monkeypatch, processors):
    """As many as leave work for every processor; a column of groups that they do not divide."""
    monkeypatch.setattr(native_cuda, "multiprocessors", lambda device: processors)
    for tokens in (3, 20, 40):
        check(exact(192, 192, 64, True, 5, card), tokens, BF16, card)


def quantised(kind, nested, dtype, blocksize, device):
    bnb = pytest.importorskip("bitsandbytes.functional")
    rng = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(128, 512, generator=rng).to(device, dtype)
    return bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=blocksize)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tokens, blocksize", [(1, 64), (11, 128), (40, 64)])
def test_as_accurate_as_a_decoded_weight(card, kind, nested, dtype, tokens, blocksize):
    """Against bitsandbytes' dequantised weight, through the op, its autograd and its bias."""
    weight = quantised(kind, nested, dtype, blocksize, card)
    import bitsandbytes.functional as bnb

    state = copy.copy(weight[1])
    state.dtype = torch.float32
    exactly = bnb.dequantize_4bit(weight[0], state)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 512, generator=rng).to(card, dtype).requires_grad_()
    dy = torch.randn(tokens, 128, generator=rng).to(card, dtype)
    bias = torch.randn(128, generator=rng).to(card, dtype)
    assert_as_accurate(
        lambda x: nf4_linear(x, weight, bias),
        lambda x: F.linear(x, exactly.to(x.dtype), bias.to(x.dtype)),
        [x],
        dy,
    )


def test_the_gain_halves_the_error_of_codes(card):
    """What it is there for: sums of many terms are as near as those of a decoded weight."""
    weight = quantised("nf4", True, BF16, 64, card)
    w = op.unpack(weight)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).to(card, BF16)
    y, want = cuda.forward(x, w), x.double() @ dense(w).mT
    eager = (F.linear(x, dense(w).to(BF16)).double() - want).norm()
    assert (y.double() - want).norm() < 1.1 * eager


def test_views(card, unit_gain, nan_filled):
    """Strides, an address that 16 bytes cannot be read from, more than one leading axis."""
    w = exact(64, 128, 64, False, 0, card)
    wide = integers(6, 3, 300, dtype=BF16, device=card)
    bias = integers(65, dtype=BF16, device=card)[1:]
    for x in (wide[..., 1:129], wide[..., :128].transpose(0, 1), wide.flatten()[1:129]):
        y = cuda.forward(x, w, bias)
        assert y.shape == (*x.shape[:-1], 64)
        same(y, F.linear(x.double(), dense(w), bias.double()))
    dy = wide.transpose(0, 1)[..., 3:67]
    same(cuda.backward(dy, w), dy.double() @ dense(w))


def test_what_is_launched(monkeypatch, library):
    emulated = Emulated(library)
    emulated.install(monkeypatch)
    weight = quantised("nf4", True, BF16, 64, CPU)

    def kernels(tokens, dtype=BF16, weight=weight, grad=True):
        emulated.launched.clear()
        x = torch.randn(tokens, weight[1].shape[1]).to(dtype).requires_grad_(grad)
        y = nf4_linear(x, weight)
        if grad:
            torch.autograd.grad(y.sum(), x)
        return emulated.launched

    assert kernels(1) == ["nf4_forward_bf16_8", "nf4_backward_bf16_8"]
    assert kernels(1, grad=False) == ["nf4_forward_bf16_8"]
    assert kernels(16) == ["nf4_forward_bf16_16", "nf4_backward_bf16_16"]
    assert kernels(17) == ["nf4_forward_bf16_32", "nf4_backward_bf16_32"]
    assert kernels(33) == ["nf4_forward_bf16_64", "nf4_backward_bf16_32"]
    assert kernels(9, FP16) == ["nf4_forward_fp16_16"]
    assert kernels(65) == kernels(0) == kernels(4, torch.float32) == []
    odd = quantised("nf4", True, BF16, 64, CPU)
    odd[1].shape = torch.Size([512 * 4, 32])
    assert kernels(4, weight=odd) == []
    assert kernels(4, weight=quantised("nf4", False, BF16, 32, CPU)) == []
    for empty in ([0, 64], [64, 0]):
        odd[1].shape = torch.Size(empty)
        assert kernels(4, weight=(odd[0][:0], odd[1])) == []


def test_the_registered_ops_launch_it(monkeypatch, library):
    emulated = Emulated(library)
    emulated.install(monkeypatch)
    w = op.unpack(quantised("fp4", False, BF16, 64, CPU))
    x = torch.randn(3, 512, dtype=BF16, requires_grad=True)
    torch.library.opcheck(torch.ops.fastprompt.nf4_linear, (x, None, *w))
    emulated.launched.clear()
    torch.ops.fastprompt.nf4_linear(x, None, *w).sum().backward()
    assert emulated.launched == ["nf4_forward_bf16_8", "nf4_backward_bf16_8"]


def test_ways_fit_the_kernels():
    assert all(way.across in (1, 2, 4) for way in (*cuda.FORWARD, *cuda.BACKWARD))


@pytest.fixture
def adopted(monkeypatch, library):
    """(emulated, three adopted Linear4bit), the CPU a card; bitsandbytes' forward is "theirs"."""
    bnb = pytest.importorskip("bitsandbytes")
    emulated = Emulated(library)
    emulated.install(monkeypatch)
    parts = [bnb.nn.Linear4bit(64, 64, compute_dtype=BF16, quant_type="nf4") for _ in range(3)]
    parts = torch.nn.ModuleList(parts).to(BF16).to("cpu").requires_grad_(False)
    linear4bit.adopt(parts)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda module, x: "theirs")
    return emulated, parts


@needs_compiler
def test_few_tokens_of_a_block(monkeypatch, adopted):
    """Of q, k and v each is a product of its own."""
    emulated, parts = adopted
    monkeypatch.setattr(products, "side_by_side", lambda x: True)
    x = torch.randn(5, 64, dtype=BF16)
    ys = products.project(x, parts, False)
    assert emulated.launched == ["nf4_forward_bf16_8"] * 3
    products.project_backward(ys, parts, False)
    assert emulated.launched[3:] == ["nf4_backward_bf16_8"] * 3
    emulated.launched.clear()
    products.project(x.expand(20, 5, 64), parts, False)
    assert emulated.launched == []


@needs_compiler
def test_what_leaves_bitsandbytes(monkeypatch, adopted):
    """For tensors that are not on the CPU."""
    part = adopted[1][0]
    monkeypatch.setattr(linear4bit, "nf4_linear", lambda x, weight, bias: x @ x.new_empty(64, 64))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == asked[0])
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: asked[1])
    asked = None, None

    def ours(tokens, dtype=BF16):
        y = part(torch.empty(tokens, 64, dtype=dtype, device="meta"))
        assert isinstance(y, torch.Tensor) or y == "theirs"
        return isinstance(y, torch.Tensor)

    assert ours(2) and ours(64) and ours(5, torch.float32)  # all of them computed in bfloat16
    assert not ours(1) and not ours(65) and not ours(0)
    asked = "meta", BF16
    assert ours(2)
    asked = "meta", FP16
    assert not ours(2)
    asked = None, None
    part.compute_dtype = torch.float32  # no kernel's
    assert not ours(2)
    part.compute_dtype = BF16
    absmax, state = part.weight.quant_state.absmax, part.weight.quant_state
    state.absmax = absmax[:0]
    assert not ours(2)
    state.absmax = absmax
    assert ours(2)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not ours(2)
    monkeypatch.setattr(cuda, "why_not", lambda device: "FASTPROMPT_CUDA=0")
    assert not ours(2)


def test_said_in_a_patchs_report(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda device: "too old" if device.index else None)
    devices = {CPU, GPU, torch.device("cuda", 1)}
    served = "2 to 64 tokens are multiplied by csrc/cuda (FASTPROMPT_CUDA=0 turns it off)"
    assert reporting._on_gpus(devices) == [
        f"  on cuda:0  {served}",
        "  on cuda:1  csrc/cuda is not used: too old",
    ]


@needs_compiler
@pytest.mark.skipif(SANITIZE in os.environ, reason="this is that run")
def test_under_sanitizers():
    """No kernel reads or writes past an end, or where the address does not allow it."""
    libraries = ["libasan.so", "libubsan.so", "libstdc++.so"]
    paths = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in libraries
    ]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("g++ has no sanitizers")
    env = os.environ | {
        SANITIZE: "1",
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TORCHDYNAMO_DISABLE": "1",
    }
    chosen = "emulated and (every_kernel or sizes_and_blocks or side_by_side or views)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-k", chosen, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


@needs_compiler
@pytest.mark.skipif(not native_cuda.archs(), reason="built without CUDA kernels")
def test_through_the_driver(library):
    """What csrc/cuda_driver.cpp asks of libcuda.so.1, which is the emulator here."""
    script = """
import sys, threading, torch
from nf4_cuda import dense, exact, integers
from fastprompt import native, native_cuda
from fastprompt.ops import nf4_linear_cuda as cuda
module = native.compiled()[0]
assert module.cuda_why_not() == "", module.cuda_why_not()
def launch(kernel, grid, threads, tensors, sizes, gain):
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    module.cuda_launch(kernel, 1, [*grid, threads], addresses, sizes, gain, 7)
native_cuda.launch, native_cuda.multiprocessors = launch, lambda device: 1
cuda.GAINS = {"nf4": 1.0}
for nested in (False, True):
    w = exact(128, 192, 64, nested, 0, "cpu")
    x, dy = (integers(5, n, dtype=torch.bfloat16, device="cpu") for n in (192, 128))
    bias = integers(128, dtype=torch.bfloat16, device="cpu", seed=2)
    y, dx = cuda.forward(x, w, bias), cuda.backward(dy, w)
    assert torch.equal(y, (x.double() @ dense(w).mT + bias).bfloat16())
    assert torch.equal(dx, (dy.double() @ dense(w)).bfloat16())
seen = []
def again():
    y.fill_(torch.nan)
    y.copy_(cuda.forward(x, w, bias))
    seen.append(torch.equal(y, (x.double() @ dense(w).mT + bias).bfloat16()))
other = threading.Thread(target=again)  # it has no context yet
other.start(), other.join()
assert seen == [True]
wrong = [("nf4_sideways", 256, "not found"), ("nf4_forward_bf16_8", 64, "invalid argument")]
for kernel, threads, said in wrong:
    try:
        launch(kernel, (1, 1), threads, [None] * 9, [64, 64, 1, 0, 0, 1], 1.0)
    except RuntimeError as error:
        assert kernel in str(error) and said in str(error), error
    else:
        raise AssertionError(kernel)
"""
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    env = os.environ | {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": ":".join(path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- on a GPU alone ----


@pytest.mark.gpu
def test_in_a_cuda_graph():
    if why := cuda.why_not(GPU):
        pytest.skip(why)
    w = exact(4096, 1024, 64, True, 0, GPU)
    x, dy = (integers(9, n, dtype=BF16, device=GPU) for n in (1024, 4096))
    wants = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(
        stream
    ):  # the allocator's first pieces; kernels may load while capturing
        torch.empty(1, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, dx = cuda.forward(x, w), cuda.backward(dy, w)
    for seed in (4, 5):
        x.copy_(integers(9, 1024, dtype=BF16, device=GPU, seed=seed))
        wants = cuda.forward(x, w), cuda.backward(dy, w)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wants[0]) and torch.equal(dx, wants[1])


@pytest.mark.gpu
def test_large_weights():
    """More than 2**31 weights: offsets beyond 32 bits."""
    if why := cuda.why_not(GPU):
        pytest.skip(why)
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB")
    rows, columns = 2**18 + 64, 2**13
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=GPU)
    w = exact(64, columns, 64, False, 0, GPU)._replace(rows=rows, packed=packed)
    w = w._replace(absmax=torch.ones(rows * columns // 64, device=GPU))
    last = w._replace(rows=64, packed=packed[-32 * columns :], absmax=w.absmax[-columns:])
    x = integers(3, columns, dtype=BF16, device=GPU)
    assert torch.equal(cuda.forward(x, w)[:, -64:], cuda.forward(x, last))
    dy = torch.zeros(3, rows, dtype=BF16, device=GPU)
    dy[:, -64:] = integers(3, 64, dtype=BF16, device=GPU)
    assert torch.equal(cuda.backward(dy, w), cuda.backward(dy[:, -64:], last))
