"""`fastprompt.quantize_`: models of timm and open_clip in 4-bit."""

import copy
import weakref

import pytest
import tiny
import torch
import zoo
from accelerate import init_empty_weights
from safetensors.torch import save_file
from test_exactness import relative
from test_families import method_for
from torch import nn

import fastprompt
from fastprompt import quantizing
from fastprompt.multihead import MultiheadAttention
from fastprompt.ops import dequantize_4bit
from fastprompt.share import is_4bit

bnb = pytest.importorskip("bitsandbytes")


def in_4bit(model):
    return [name for name, module in model.named_modules() if is_4bit(module)]


def same(one, other):
    """Whether two models are alike bit for bit, their buffers and 4-bit weights' scales too."""
    a, b = (
        dict(m.state_dict(), **{f"buffer {n}": t for n, t in m.named_buffers()})
        for m in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type, blocksize", [("nf4", 64), ("fp4", 128), ("nf4", 4096)])
def test_every_format_is_bitsandbytes_own(quant_type, blocksize, nested):
    dense = zoo.build("open_clip", torch.bfloat16)
    model = copy.deepcopy(dense)
    options = dict(quant_type=quant_type, blocksize=blocksize)
    assert fastprompt.quantize_(model, nested=nested, **options) is model
    for name, weight in (
        (
            "visual.transformer.resblocks.1.mlp.c_fc",
            "visual.transformer.resblocks.1.mlp.c_fc.weight",
        ),
        ("transformer.resblocks.0.attn.in_proj", "transformer.resblocks.0.attn.in_proj_weight"),
        ("transformer.resblocks.0.attn.out_proj", "transformer.resblocks.0.attn.out_proj.weight"),
    ):
        got, source = model.get_submodule(name).weight, dense.get_parameter(weight)
        packed, state = bnb.functional.quantize_4bit(
            source.data, compress_statistics=nested, **options
        )
        assert torch.equal(got.data, packed) and got.quant_state.nested == nested
        assert torch.equal(
            dequantize_4bit((got, got.quant_state)), dequantize_4bit((packed, state))
        )
        assert not got.requires_grad


def test_what_is_quantised_and_what_is_not():
    model = fastprompt.quantize_(zoo.build("open_clip, coca"), skip=["mlp.c_fc", "text_decoder"])
    blocks = (
        f"{tower}.transformer.resblocks.{i}" for tower in ("text", "visual") for i in range(3)
    )
    parts = ("attn.in_proj", "attn.out_proj", "mlp.c_proj")
    assert {*in_4bit(model)} == {f"{block}.{part}" for block in blocks for part in parts}
    attention = model.text.transformer.resblocks[0].attn
    assert type(attention) is MultiheadAttention and not attention.training
    assert type(model.visual.attn_pool.attn) is nn.MultiheadAttention

    model = fastprompt.quantize_(zoo.build("timm_vit, siglip", torch.float32), dtype=torch.bfloat16)
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert in_4bit(model) == [f"blocks.{i}.{part}" for i in range(3) for part in parts]
    dense = [p for n, p in model.named_parameters() if p.is_floating_point()]
    assert {p.dtype for p in dense} == {torch.bfloat16} and model.head.weight in {*dense}
    assert model.blocks[0].mlp.fc1.compute_dtype == torch.bfloat16
    out = model(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_attention_of_another_kind_stays_dense():
    model = nn.ModuleDict(
        dict(
            wide=nn.MultiheadAttention(32, 2, kdim=16, vdim=16),
            biased=nn.MultiheadAttention(32, 2, add_bias_kv=True),
            zero=nn.MultiheadAttention(32, 2, add_zero_attn=True),
            own=nn.MultiheadAttention(32, 2, bias=False),
            one=nn.Linear(32, 32),
        )
    )
    fastprompt.quantize_(model)
    assert in_4bit(model) == ["own.in_proj", "own.out_proj", "one"]
    x = torch.randn(2, 3, 32)
    assert model["own"](x, x, x, need_weights=False)[0].isfinite().all()
    assert [p.requires_grad for p in model["one"].parameters()] == [False, True]


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_shared_stays_shared(empty, tmp_path):
    """A bias of two layers, one of them dense; a layer under two names, and one that is a head."""

    def build():
        model = nn.ModuleDict(dict(one=nn.Linear(32, 32), norm=nn.LayerNorm(32)))
        model["norm"].bias = model["one"].bias
        model["deep"] = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model["again"], model["head"] = model["deep"][0], model["deep"][1]
        return model

    model, weights = build(), None
    if empty:
        weights = tmp_path / "model.bin"
        torch.save(model.state_dict(), weights)
        model.to("meta")
        model["norm"].bias = model["one"].bias
    fastprompt.quantize_(model, weights=weights, dtype=torch.bfloat16)
    assert model["norm"].bias is model["one"].bias and model["one"].bias.dtype == torch.bfloat16
    assert in_4bit(model) == ["one", "deep.0"] and model["again"] is model["deep"][0]
    assert type(model["deep"][1]) is nn.Linear and model["head"] is model["deep"][1]


def test_an_attention_that_reads_its_layers_weights():
    """open_clip's ResNets pool by one."""
    import open_clip

    resnet = dict(image_size=32, layers=(1, 1, 1, 1), width=8, head_width=32)
    text = dict(context_length=11, vocab_size=64, width=64, heads=4, layers=2)
    model = fastprompt.quantize_(open_clip.CLIP(64, vision_cfg=resnet, text_cfg=text).eval())
    assert {name.partition(".")[0] for name in in_4bit(model)} == {"transformer"}
    assert model.encode_image(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_an_attention_is_called_as_before():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(attn=nn.MultiheadAttention(64, 2))).eval()
    x = torch.randn(5, 64)
    want, weights = model["attn"](x, x, x)
    fastprompt.quantize_(model)
    got, ours = model["attn"](x, x, x)
    assert relative(got, want) < 0.2 and ours.shape == weights.shape
    torch.testing.assert_close(ours.sum(-1), torch.ones(5))


EMPTY = ["timm_vit, dinov2", "timm_beit", "timm_eva", "timm_eva, dinov3"]
EMPTY += ["open_clip, coca", "open_clip, timm", "open_clip, own attention"]


@pytest.mark.parametrize("name", EMPTY)
def test_from_a_file_into_an_empty_model(name, tmp_path):
    """As from memory; and what it computes is what the decoded weights do (`test_families`)."""
    dense = zoo.build(name, torch.float32)
    path = tmp_path / "model.safetensors"
    more = {"of no module": torch.zeros(1)}
    save_file({n: t.contiguous() for n, t in dense.state_dict().items()} | more, path)
    with init_empty_weights():
        empty = zoo.ROWS[name].build().eval()
    assert any(p.is_meta for p in empty.parameters())
    fastprompt.quantize_(empty, weights=tmp_path if name == EMPTY[0] else path)
    fastprompt.quantize_(dense)
    assert same(empty, dense)
    given = zoo.inputs(name, torch.float32)
    with torch.no_grad():
        got, want = (tiny.output(name, model, given) for model in (empty, dense))
    assert torch.equal(got, want)
    assert fastprompt.patch(empty)


def test_from_a_file_of_torch_save(tmp_path):
    dense, other = (zoo.build("open_clip", torch.float32, seed=seed) for seed in (0, 1))
    torch.save(dense.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    fastprompt.quantize_(other, weights=tmp_path, dtype=torch.bfloat16)
    assert same(other, fastprompt.quantize_(dense, dtype=torch.bfloat16))
    given = zoo.inputs("open_clip", torch.bfloat16)
    assert other(**given)[1].dtype == torch.bfloat16  # not that of packed weights


def peak_bytes(work, mapped=0):
    """Bytes that ``work`` had at its peak, and has at its end, beside what was there before.

    ``mapped``: the size of a file that it reads, which torch counts whenever it is mapped.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = still_mapped = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) == mapped:
            still_mapped += event.nbytes()
            continue
        now += event.nbytes()
        peak = max(peak, now)
    assert not still_mapped, "a tensor of the model is a view of the file"
    return peak, now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_the_4bit_model_and_one_block(tmp_path, dtype):
    from timm.models.vision_transformer import VisionTransformer

    def build():
        return VisionTransformer(16, 8, embed_dim=256, depth=8, num_heads=4, num_classes=0)

    dense = build().to(dtype)
    size = {n: t.numel() * t.element_size() for n, t in dense.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(dense.state_dict(), path)
    block = sum(n for name, n in size.items() if name.startswith("blocks.0."))
    with init_empty_weights():
        model = build()
    peak, end = peak_bytes(lambda: fastprompt.quantize_(model, weights=path), path.stat().st_size)
    assert end < sum(size.values()) / (5 if dtype == torch.float32 else 3)
    assert peak < end + block
    peak, end = peak_bytes(lambda: fastprompt.quantize_(dense))
    assert peak < end + block


def test_dense_weights_are_let_go_one_by_one(monkeypatch):
    model, packed, counts = zoo.build("open_clip"), quantizing._packed, []
    weights = [weakref.ref(p) for n, p in model.named_parameters() if p.ndim == 2 and "resb" in n]

    def counting(*args):
        counts.append(sum(ref() is not None for ref in weights))
        return packed(*args)

    monkeypatch.setattr(quantizing, "_packed", counting)
    fastprompt.quantize_(model)
    # an attention's two weights go with it, when both are done
    assert counts[::4] == list(range(24, 0, -4)) and counts[3::4] == list(range(21, 0, -4))


def test_what_is_not_loaded_and_what_is(tmp_path):
    dense = zoo.build("open_clip", torch.float32)
    packed = fastprompt.quantize_(copy.deepcopy(dense))
    for state in (packed.state_dict(), {"visual.transformer.resblocks.0.attn.in_proj.weight": 0}):
        with pytest.raises(ValueError, match=r"in_proj\.weight: want no weights of 4-bit layers"):
            packed.load_state_dict(state, strict=False)
    patch = fastprompt.patch(packed, method_for("open_clip"))
    with torch.no_grad():
        for p in patch.prompts.values():
            p.tokens.normal_()
    fastprompt.save(packed, tmp_path)
    got = fastprompt.load(dense, tmp_path).prompts  # trained in 4-bit, used dense
    assert all(torch.equal(got[n].tokens, p.tokens) for n, p in patch.prompts.items())
    state = {n: torch.zeros_like(p) for n, p in patch.trainable.items()}
    packed.load_state_dict(state, strict=False)
    assert not any(p.any() for p in patch.trainable.values())


def test_copies_and_evaluation():
    """On some CPUs bitsandbytes alone repacks weights in evaluation: gradients are then wrong."""
    packed = fastprompt.quantize_(zoo.build("timm_eva", torch.float32))
    given = zoo.inputs("timm_eva", torch.float32)
    with torch.no_grad():
        want = packed(**given)
        assert torch.equal(copy.deepcopy(packed)(**given), want)
    fastprompt.patch(packed, method_for("timm_eva")).undo()
    with torch.no_grad():
        assert torch.equal(packed(**given), want)
    assert relative(packed.train()(**given), want) < 1e-6


def refused(what, build=lambda: zoo.build("timm_vit", torch.float32), **options):
    model = build()
    kinds = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=what):
        fastprompt.quantize_(model, **options)
    assert kinds == {n: type(m) for n, m in model.named_modules()}


def test_refusals(tmp_path):
    refused("quant_type: want one of nf4, fp4; got 'int4'", quant_type="int4")
    refused("blocksize: want one of .* got 48", blocksize=48)
    refused("dtype: want a floating-point one", dtype=torch.int8)
    refused("skip: want names of modules of the model, got 'mlp.fc'", skip=["mlp.fc"])
    refused("found none outside blocks, lm_head", skip=["blocks"])
    float8 = torch.float8_e4m3fn
    refused(r"0\.weight: .* got torch.float8", lambda: nn.Sequential(nn.Linear(64, 64).to(float8)))
    refused("want linear layers to quantise", lambda: nn.Linear(64, 64))
    refused("LlamaForCausalLM: want .*BitsAndBytesConfig", lambda: tiny.build("llama"))
    refused("is a TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(32, 2))

    def patched():
        model = zoo.build("timm_vit", torch.float32)
        fastprompt.patch(model)
        return model

    def quantised():
        return fastprompt.quantize_(zoo.build("timm_vit", torch.float32))

    def empty(buffers=False):
        with init_empty_weights(include_buffers=buffers):
            return zoo.ROWS["timm_beit"].build()

    refused("it is patched: quantise first", patched)
    refused(r"blocks\.0\.attn\.qkv is quantised already \(Linear4bit\)", quantised)
    refused("want weights=, got a model on the meta device", empty)
    refused("want buffers with values", lambda: empty(True))
    path = tmp_path / "model.safetensors"
    refused("want a file, or a folder with one of", weights=tmp_path)
    state = {n: t.clone() for n, t in zoo.build("timm_vit", torch.float32).state_dict().items()}
    save_file(state | {"norm.bias": torch.zeros(3)}, path)
    refused(r"norm\.bias: want \[32\], got \[3\]", weights=path)
    save_file({n: t for n, t in state.items() if n != "norm.bias"}, path)
    refused(r"want norm\.bias in it \(1 are missing\)", weights=path)
