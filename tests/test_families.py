"""Every family of `zoo.py`: exactness, generation, 4-bit, gradient checkpointing, padding, undo."""

import copy

import pytest
import tiny
import torch
import zoo
from test_exactness import relative
from torch import nn
from transformers import PreTrainedModel
from undone import check_undo

import fastprompt
from fastprompt import attention
from fastprompt.concatenation import concatenate
from fastprompt.families import TOWERS
from fastprompt.methods import L2P, DeepPrompts
from fastprompt.ops import dequantize_4bit, reference
from fastprompt.recorder import listening
from fastprompt.share import is_4bit
from fastprompt.viz import attention_to_prompts

ALL = list(zoo.ROWS)
OUTSIDE = [name for name, row in zoo.ROWS.items() if row.library != "transformers"]
GENERATES = [name for name, row in zoo.ROWS.items() if row.generates]
P = 3


@pytest.fixture
def wide(monkeypatch):
    """transformers computes rotations, norms and softmax in float32: here in float64."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def method_for(name, rows=P):
    row = zoo.ROWS[name]
    return DeepPrompts(vision=rows * row.vision, text=rows * row.text, train_head=False)


def pair(name, model=None):
    """The same model with side keys and with literal rows, and the same prompts in both."""
    ours = zoo.build(name) if model is None else model
    theirs = copy.deepcopy(ours)
    patch = fastprompt.patch(ours, method_for(name))
    written = concatenate(theirs, method_for(name))
    assert patch.prompts.keys() == written.keys()
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens.normal_())
    return ours, theirs, patch, written


@pytest.mark.parametrize("name", ALL)
def test_output_and_every_prompt_gradient(name, wide):
    given = zoo.inputs(name)
    base = tiny.output(name, zoo.build(name), given)
    ours, theirs, patch, written = pair(name)
    got, want = tiny.output(name, ours, given), tiny.output(name, theirs, given)
    assert relative(got, want) < 1e-10
    assert relative(base, want) > 1e-3, "the prompts do nothing"
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert prompt.tokens.grad.any(), key
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-10, key


@pytest.mark.parametrize("name", ALL)
def test_blocks_that_the_readme_stars_run_as_one_node(name):
    starred = {(f.kind, f.name) for f in TOWERS if any(layout.blocks for layout in f.layouts)}
    patch = fastprompt.patch(zoo.build(name, torch.float32), method_for(name))
    for tower in patch.anatomy.towers:
        as_one = {block.name for block in tower.blocks} - patch.unfused.keys()
        assert bool(as_one) == ((tower.kind, tower.family) in starred), tower.name


def gradients(name, checkpointing=None):
    """Output and prompts' gradients in training, with a kind of gradient checkpointing or none."""
    model = zoo.build(name)
    patch = fastprompt.patch(model, method_for(name))
    torch.manual_seed(3)
    for p in patch.trainable.values():
        p.data.normal_()
    model.train()
    if checkpointing is not None and name in OUTSIDE:
        model.set_grad_checkpointing()
    elif checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    torch.manual_seed(4)
    out = tiny.output(name, model, zoo.inputs(name))
    out.square().sum().backward()
    return [out, *(p.grad for p in patch.trainable.values())]


# open_clip cannot checkpoint such blocks: it gives them arguments that they do not take
@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
@pytest.mark.parametrize("name", [name for name in ALL if name != "open_clip, own attention"])
def test_gradient_checkpointing_changes_nothing(name):
    plain = gradients(name)
    for kind in ("other",) if name in OUTSIDE else ("reentrant", "other"):
        for old, new in zip(plain, gradients(name, kind), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_undo_gives_the_old_model_bitwise(name):
    model, given = zoo.build(name, torch.float32), zoo.inputs(name, torch.float32)
    check_undo(model, lambda: tiny.output(name, model, given))


def four_bit(model):
    """The model with every linear layer of its blocks in NF4, and the same with those decoded."""
    if not isinstance(model, PreTrainedModel):
        return quantised(model)
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    whole, left = copy.deepcopy(model), model._keep_in_fp32_modules or []  # as the loader does
    for tower in fastprompt.families.anatomy(model).towers:
        for block in tower.blocks:
            for name, layer in list(block.layer.named_modules()):
                if not isinstance(layer, (nn.Linear, Conv1D)) or name.split(".")[-1] in left:
                    continue
                weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
                new = Linear4bit(
                    *weight.T.shape, layer.bias is not None, torch.float64, quant_type="nf4"
                )
                new.weight.data = weight.data.float().contiguous()
                if layer.bias is not None:
                    new.bias.data = layer.bias.data
                new = new.to("cpu").requires_grad_(False)
                block.layer.set_submodule(name, new)
                old = whole.get_submodule(f"{block.name}.{name}")
                decoded = dequantize_4bit((new.weight, new.weight.quant_state)).to(weight.dtype)
                old.weight.data = decoded.T if isinstance(layer, Conv1D) else decoded
    return model, whole


def quantised(model):
    """As `four_bit`, by `fastprompt.quantize_`."""
    whole = copy.deepcopy(model)
    fastprompt.quantize_(model, dtype=torch.float64)
    for name, module in model.named_modules():
        if is_4bit(module):
            owner = whole.get_submodule(name.removesuffix(".in_proj"))
            key = "in_proj_weight" if name.endswith(".in_proj") else "weight"
            decoded = dequantize_4bit((module.weight, module.weight.quant_state)).double()
            assert decoded.shape == getattr(owner, key).shape
            getattr(owner, key).data = decoded
    return model, whole


@pytest.mark.parametrize("name", ALL)
def test_four_bit_weights(name):
    pytest.importorskip("bitsandbytes")
    packed, whole = four_bit(zoo.build(name))
    given = zoo.inputs(name)
    ours, theirs = (fastprompt.patch(model, method_for(name)) for model in (packed, whole))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in ours.prompts.items():
            theirs.prompts[key].tokens.copy_(prompt.tokens.normal_())
    got, want = tiny.output(name, packed, given), tiny.output(name, whole, given)
    assert relative(got, want) < 1e-6
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in ours.prompts.items():
        assert relative(prompt.tokens.grad, theirs.prompts[key].tokens.grad) < 1e-5, key
    assert "in 4-bit" in ours.report()


def words(given):
    """Which of the inputs is the text that goes on."""
    return "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"


def longer(name, given, tokens):
    """The inputs with one more token in each sample."""
    text = words(given)
    more = dict(given, **{text: torch.cat([given[text], tokens], dim=1)})
    kinds = dict(attention_mask=1, token_type_ids=zoo.ROWS[name].next_type, mm_token_type_ids=0)
    for key, fill in kinds.items():
        if key in given:
            row = torch.full_like(tokens, fill, dtype=given[key].dtype)
            more[key] = torch.cat([given[key], row], dim=1)
    return more


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATES)
def test_generate_gives_the_reference_tokens(name, cache):
    ours, theirs, *_ = pair(name)
    given = zoo.inputs(name)
    text, steps = words(given), 5
    start = given[text].shape[1]
    with torch.no_grad():
        whole = given
        for _ in range(steps):
            whole = longer(name, whole, theirs(**whole).logits[:, -1:].argmax(-1))
        got = ours.generate(
            **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
            pad_token_id=0, **dict(cache_implementation="static") if cache == "static" else {},
        )  # fmt: skip
    assert torch.equal(got[:, start:], whole[text][:, start:])


# T5's prompts stand before the first place of a row, and T5 pads at the right
@pytest.mark.parametrize("name", [name for name in GENERATES if name != "t5"])
def test_left_padding_changes_nothing(name):
    model, given = zoo.build(name), zoo.inputs(name)
    patch = fastprompt.patch(model, method_for(name))
    with torch.no_grad():
        for prompt in patch.prompts.values():
            prompt.tokens.normal_()
        padded, pad = dict(given), torch.zeros(2, 2, dtype=torch.long)
        padded.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in padded:
                padded[key] = torch.cat([pad.to(padded[key].dtype), padded[key]], dim=1)
        if patch.anatomy.tower("text").rotary is None:  # learned positions count from the padding
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        got, want = model(**padded).logits[:, 2:], model(**given).logits
    assert relative(got, want) < 1e-5  # float32 rotation


@pytest.mark.parametrize("name", GENERATES)
def test_the_loss_in_training_is_that_of_all_logits(name):
    model, given = zoo.build(name), zoo.inputs(name)
    fastprompt.patch(model)
    labels = torch.randint(6, 63, given[words(given)].shape)
    labels[:, :3] = -100
    with torch.no_grad():
        want = model(**given, labels=labels).loss
    assert relative(model.train()(**given, labels=labels).loss, want) < 1e-6  # float32


def test_a_pooling_head_makes_its_own_mask():
    """SigLIP 2's: beside the blocks, for an attention that is not ours."""
    ours, theirs, *_ = pair("siglip2 vision")
    given = zoo.inputs("siglip2 vision")
    with torch.no_grad():
        got, want = (model(**given).pooler_output for model in (ours, theirs))
    assert relative(got, want) < 1e-6


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_packed_images_are_one_call_of_attention(name):
    model, given, seen = zoo.build(name), zoo.inputs(name), []
    fastprompt.patch(model, method_for(name))

    def look(block, inputs, options):
        if "visual" in block:
            seen.append((block, options["cu_seqlens_q"].tolist()))

    with torch.no_grad(), listening(look):
        model(**given)
    assert [block for block, _ in seen] == [f"model.visual.blocks.{i}" for i in range(3)]
    windows = [0, 16, 32, 48] if name == "qwen2_5_vl" else [0, 16, 48]
    assert [ends for _, ends in seen] == [windows, [0, 16, 48], windows]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_eager_for_lack_of_another_still_runs_the_kernels(name, monkeypatch):
    model, given = zoo.build(name, torch.float32), zoo.inputs(name, torch.float32)
    patch = fastprompt.patch(model, method_for(name))
    with torch.no_grad():
        out = model(**given, output_attentions=True)
        shape = [2, 4, 11, P + 11]
        assert all(list(weights.shape) == shape for weights in out.attentions)
        sums = torch.stack([weights.sum(-1) for weights in out.attentions])
        assert (sums < 1).all() if name == "gpt_oss" else torch.allclose(sums, torch.ones(()))
        monkeypatch.setattr(reference, "prompt_attention_with_weights", None)
        assert relative(model(**given).logits, out.logits) < 1e-5
    assert all(block.by_need for block in patched_attentions(patch))


def patched_attentions(patch):
    blocks = (block for tower in patch.anatomy.towers for block in tower.blocks)
    return [vars(block.attention)[attention.ATTRIBUTE] for block in blocks]


@pytest.mark.parametrize("name", ["deit", "dinov2_with_registers", "dinov3_vit", "beit"])
def test_a_pool_of_prompts(name):
    model, given = zoo.build(name), zoo.inputs(name)
    method = L2P(pool_size=6, length=2, top_n=2)
    patch = fastprompt.patch(model, method)
    tiny.output(name, model, given).square().sum().backward()
    patch.auxiliary_loss().backward()
    assert all(p.grad is not None for p in patch.trainable.values())


def test_what_a_pool_does_not_take():
    for name in ("swin", "internvl_vision"):
        with pytest.raises(ValueError, match=f"L2P: want one of vit, deit.*; got {name}"):
            fastprompt.patch(zoo.build(name), L2P())


def test_experts_stay_dense_and_attention_is_four_bit():
    pytest.importorskip("bitsandbytes")
    model, _ = four_bit(zoo.build("mixtral"))
    kinds = {n: type(m).__name__ for n, m in model.model.layers[0].named_modules()}
    assert kinds["self_attn.k_proj"] == "Linear4bit" and "Linear4bit" not in (
        kind for n, kind in kinds.items() if "experts" in n
    )
    report = fastprompt.patch(model).report()
    assert "(12 layers)" in report
    dense = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert dense and f"experts  {dense:,} parameters, dense" in report


DROPPING = ["gpt2", "opt", "bert", "t5", "gemma2", "gpt_oss", "timm_vit", "timm_beit", "open_clip"]


@pytest.mark.parametrize("name", DROPPING)
def test_attention_dropout_drops_from_whole_rows(name):
    """So seldom that nothing is dropped: what is left of it is how rows are made whole."""
    model, given = zoo.build(name), zoo.inputs(name)
    patch = fastprompt.patch(model, method_for(name))
    assert "attention dropout" not in patch.report()
    with torch.no_grad():
        want = tiny.output(name, model, given)
        for tower in patch.anatomy.towers:
            for block in tower.blocks:
                for key in ("attention_dropout", "attn_dropout", "attn_drop", "dropout"):
                    found = getattr(block.attention, key, None)
                    if isinstance(found, nn.Dropout):
                        found.p = 1e-12
                    elif found is not None:
                        setattr(block.attention, key, 1e-12)
        assert relative(tiny.output(name, model.train(), given), want) < 1e-6
    assert "attention dropout 1e-12: in training, keys are concatenated" in patch.report()


def test_looking_at_packed_images():
    model, given = zoo.build("qwen2_5_vl", torch.float32), zoo.inputs("qwen2_5_vl", torch.float32)
    fastprompt.patch(model, method_for("qwen2_5_vl"))
    pixels, grid = given["pixel_values"], given["image_grid_thw"]
    whole = attention_to_prompts(model, **given)
    seen = {}
    with torch.no_grad(), listening(lambda name, inputs, options: seen.update({name: inputs})):
        model.model.visual(pixels[:16], grid_thw=grid[:1])
    for name, (q, k, _, prompt_k, _) in seen.items():
        keys = torch.cat([prompt_k[None], k], dim=2)
        weights = torch.softmax(q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        torch.testing.assert_close(whole[name][:, :, :16], weights[..., :P].sum(-1))


def test_looking_at_rows_with_sinks():
    model, given = zoo.build("gpt_oss", torch.float32), zoo.inputs("gpt_oss", torch.float32)
    fastprompt.patch(model, method_for("gpt_oss"))
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions
    for got, want in zip(attention_to_prompts(model, **given).values(), weights, strict=True):
        torch.testing.assert_close(got, want[..., :P].sum(-1))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["t5", "gpt_oss", "qwen2_5_vl", "swin", "timm_beit"])
def test_half_precision(name, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model, given = zoo.build(name, dtype), zoo.inputs(name, dtype)
    patch = fastprompt.patch(model, method_for(name))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = tiny.output(name, model.train(), given)
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in patch.trainable.values())


def test_t5s_bias_moves_on_with_its_cache():
    model, given = zoo.build("t5"), zoo.inputs("t5")
    patch = fastprompt.patch(model, method_for("t5"))
    said = given.pop("decoder_input_ids")
    with torch.no_grad():
        for prompt in patch.prompts.values():
            prompt.tokens.normal_()
        whole = model(**given, decoder_input_ids=said).logits[:, -1]
        first = model(**given, decoder_input_ids=said[:, :-1], use_cache=True)
        last = model(
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=said[:, -1:],
            past_key_values=first.past_key_values,
        )
    assert relative(last.logits[:, -1], whole) < 1e-10
