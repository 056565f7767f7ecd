"""Prompts and PEFT's LoRA on one model: LoRA first or prompts first, against literal rows."""

import copy
import warnings

import pytest
import tiny
import torch
import zoo
from test_exactness import greedy, relative
from test_families import four_bit

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.methods import M2PT, VPT, DeepPrompts, LoRA, PrefixTuning

peft = pytest.importorskip("peft")
P = 3
ORDERS = ["lora, prompts", "prompts, lora"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "vit": ["q_proj", "k_proj", "v_proj", "fc1"],
}
TARGETS["clip_vision"] = TARGETS["vit"]


def build(name, dtype=torch.float64):
    model = tiny.build(name, dtype) if name in tiny.FAMILIES else zoo.build(name, dtype)
    tiny.in_float64(model)
    return model


def given(name, dtype=torch.float64):
    return (tiny if name in tiny.FAMILIES else zoo).inputs(name, dtype)


def lora(model, name="llama", **options):
    targets = TARGETS.get(name, ["q_proj", "k_proj", "v_proj", "up_proj"])
    fan = dict(fan_in_fan_out=True) if name == "gpt2" else {}
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **fan, **options)
    made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise(model)
    return made


def of_lora(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def randomise(model):
    torch.manual_seed(9)
    for p in of_lora(model).values():
        p.data.normal_(std=0.3)


def prompt(model, method):
    patch = fastprompt.patch(model, method)
    torch.manual_seed(7)
    for p in patch.prompts.values():
        p.tokens.data.normal_()
    return patch


def both(name, order, method=None, model=None, **options):
    """(PeftModel, Patch, the model inside)."""
    method = method or DeepPrompts(
        P * (name in ("vit", "clip_vision")), P * (name not in ("vit", "clip_vision")),
        train_head=False,
    )  # fmt: skip
    model = build(name) if model is None else model
    if order == ORDERS[0]:
        wrapped = lora(model, name, **options)
        patch = prompt(wrapped, method)
    else:
        patch = prompt(model, method)
        wrapped = lora(model, name, **options)
        patch.requires_grad_()
    assert patch.model is model and fastprompt.patch_of(wrapped) is patch
    return wrapped, patch, model


def literal(name, patch, **options):
    model = build(name)
    lora(model, name, **options)
    written = concatenate(model, patch.method)
    for key, found in patch.prompts.items():
        written[key].tokens.data.copy_(found.tokens)
    for p in of_lora(model).values():
        p.requires_grad_(True)
    return model, written


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "vit", "clip_vision"])
def test_output_and_every_gradient(name, order, monkeypatch):
    if name == "phi3":
        for single in ("float", "float32"):  # its rotation, norms and softmax
            monkeypatch.setattr(torch, single, torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wrapped, patch, ours = both(name, order)
    theirs, written = literal(name, patch)
    batch = given(name)
    got, want = tiny.output(name, wrapped, batch), tiny.output(name, theirs, batch)
    assert relative(got, want) < 1e-10
    with wrapped.disable_adapter(), torch.no_grad():
        assert relative(tiny.output(name, wrapped, batch), want) > 1e-3
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, p in patch.prompts.items():
        assert relative(p.tokens.grad, written[key].tokens.grad) < 1e-10, key
    expected = of_lora(theirs)
    for key, p in of_lora(ours).items():
        assert relative(p.grad, expected[key].grad) < 1e-10, key
    with_grad = {n for n, p in ours.named_parameters() if p.grad is not None}
    assert with_grad == set(of_lora(ours)) | set(patch.trainable)


@pytest.mark.parametrize("order", ORDERS)
def test_kept_keys_follow_the_adapters(order):
    wrapped, _, model = both("llama", order)
    batch = given("llama")

    def check():
        theirs = copy.deepcopy(model)
        for p in fastprompt.patch_of(theirs).prompts.values():
            p.refresh()
        with torch.no_grad():
            got = [wrapped(**batch).logits for _ in range(2)]
            want = theirs(**batch).logits
        assert torch.equal(got[0], want) and torch.equal(got[1], want)
        return want

    wrapped.eval()
    first = check()
    with wrapped.disable_adapter():
        assert relative(check(), first) > 1e-3
    assert torch.equal(check(), first)
    wrapped.merge_adapter()
    assert relative(check(), first) < 1e-6
    wrapped.unmerge_adapter()
    assert relative(check(), first) < 1e-6
    config = peft.LoraConfig(r=3, target_modules=["k_proj"])
    wrapped.add_adapter("other", config, autocast_adapter_dtype=False)
    wrapped.set_adapter("other")
    randomise(model)
    assert relative(check(), first) > 1e-3
    before = check()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["other"] = 5.0
    assert relative(check(), before) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_undo_gives_the_peft_model_back(order):
    plain = lora(build("llama"))
    wrapped, patch, model = both("llama", order)
    batch = given("llama")
    with torch.no_grad():
        changed = wrapped(**batch).logits
        patch.undo()
        want = plain(**batch).logits
        assert torch.equal(wrapped(**batch).logits, want) and relative(changed, want) > 1e-3
    flags, wanted = (
        {n: p.requires_grad for n, p in m.named_parameters()} for m in (wrapped, plain)
    )
    assert flags == wanted
    assert wrapped.unload() is not None
    assert not any("fastprompt" in n or "lora" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("order", ORDERS)
def test_save_holds_prompts_alone(order, tmp_path):
    wrapped, patch, _ = both("llama", order)
    path = fastprompt.save(wrapped, tmp_path)
    tensors = fastprompt.read_card(path)["tensors"]
    assert set(tensors) == set(patch.trainable) and len(tensors) == 3
    wrapped.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(
        build("llama"), tmp_path / "lora", autocast_adapter_dtype=False
    )
    fastprompt.load(again, tmp_path)
    with torch.no_grad():
        got, want = (m.eval()(**given("llama")).logits for m in (again, wrapped))
    assert relative(got, want) < 1e-6  # PEFT saves in float32
    fastprompt.load(build("llama"), tmp_path)  # and without LoRA
    state = peft.get_peft_model_state_dict(wrapped)
    assert not any("fastprompt" in key for key in state)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_without_adapters_run_as_one_node(order):
    wrapped, patch, _ = both("llama", order, layers_to_transform=[1])
    wrapped.train()(**given("llama")).logits.sum().backward()
    report = patch.report()
    assert "blocks  2 of 3 as one autograd node" in report
    assert "unfused  model.layers.1: self_attn.q_proj has an adapter (PEFT's)" in report
    count = sum(p.numel() for p in of_lora(patch.model).values())
    assert f"adapters  {count:,}  (PEFT's LORA, which saves them)" in report
    assert f"trains  {3 * P * 32:,} of" in report


@pytest.mark.filterwarnings("ignore:.*(checkpointing|reentrant).*")
@pytest.mark.parametrize("order", ORDERS)
def test_gradient_checkpointing_changes_nothing(order):
    def gradients(reentrant=None):
        wrapped, _, model = both("llama", order)
        wrapped.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped(**given("llama")).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    want = gradients()
    for reentrant in (True, False):
        torch.testing.assert_close(gradients(reentrant), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_generate(order):
    wrapped, _, model = both("llama", order)
    batch = given("llama")
    with torch.no_grad():
        want = greedy(model.eval(), batch, 4)
        mask = torch.ones_like(batch["input_ids"])
        got = wrapped.generate(
            **batch, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS)
def test_four_bits(order):
    pytest.importorskip("bitsandbytes")
    packed, whole = four_bit(build("llama"))
    packed.is_loaded_in_4bit = True
    layers = sum(hasattr(m, "quant_state") for m in packed.modules())
    out = []
    for model in (packed, whole):
        wrapped, patch, _ = both("llama", order, model=model)
        logits = wrapped(**given("llama")).logits
        logits.square().sum().backward()
        out.append([logits, *(p.grad for p in patch.trainable.values())])
        out[-1] += [p.grad for p in of_lora(model).values()]
        assert (f"in 4-bit ({layers} layers)" in patch.report()) == (model is packed)
    names = {type(m).__module__ for m in packed.modules() if hasattr(m, "lora_A")}
    assert names == {"peft.tuners.lora.bnb"}
    for got, want in zip(*out, strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_prefix_tuning_beside_lora(order):
    """Keys and values that pass no projection pass no adapter."""
    _, patch, model = both("llama", order, PrefixTuning(P))
    tokens = next(iter(patch.prompts.values())).tokens
    side = vars(patch.anatomy.towers[0].blocks[0].attention)["_fastprompt"]
    k, v = side.prompt.keys_values(side.project)
    assert torch.equal(k, tokens[:, 0].transpose(0, 1))
    assert torch.equal(v, tokens[:, 1].transpose(0, 1))
    model(**given("llama")).logits.sum().backward()
    assert tokens.grad.any() and all(p.grad is not None for p in of_lora(model).values())


def test_frozen_prompts_are_told_of():
    model = build("llama")
    patch = prompt(model, DeepPrompts(text=P))
    wrapped = lora(model).train()
    assert not any(p.requires_grad for p in patch.trainable.values())
    with pytest.warns(UserWarning, match=r"none of the prompts: if get_peft_model froze them, pat"):
        wrapped(**given("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(**given("llama"))  # once
        other = prompt(build("llama"), DeepPrompts(text=P)).model.train()
        other(**given("llama"))
    assert all(p.requires_grad for p in patch.requires_grad_().trainable.values())


def test_a_head_that_peft_trains_is_left_to_it():
    model = tiny.build("vit")
    wrapped = lora(model, "vit", modules_to_save=["classifier"])
    patch = prompt(wrapped, VPT(P))
    assert "classifier: head, adapted by PEFT, which trains it" in patch.report()
    assert not any("classifier" in name for name in patch.trainable)
    wrapped(**tiny.inputs("vit")).logits.sum().backward()
    assert wrapped.base_model.model.classifier.modules_to_save["default"].weight.grad is not None


def test_lora_in_the_language_model_of_m2pt():
    model = tiny.build("llava")
    targets = r".*language_model.*\.(q|v)_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    patch = prompt(wrapped, M2PT(2, 2))
    wrapped.train()(
        **tiny.inputs("llava"), labels=tiny.inputs("llava")["input_ids"]
    ).loss.backward()
    assert all(p.grad.any() for p in patch.trainable.values())
    assert all(p.grad is not None for n, p in of_lora(model).items() if "lora_B" in n)
    assert "blocks  2 of 5 as one autograd node" in patch.report()


def test_adapters_of_transformers_own(tmp_path):
    """``model.add_adapter``: its checkpoints hold adapters and prompts."""
    model = tiny.build("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    patch = prompt(model, DeepPrompts(text=P))
    assert all(p.requires_grad for p in of_lora(model).values())
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "adapter_model.safetensors"} <= names
    assert set(fastprompt.read_card(tmp_path)["tensors"]) == set(patch.trainable)


def test_refusals():
    for config in (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        wrapped = peft.get_peft_model(tiny.build("llama"), config)
        with pytest.raises(
            ValueError, match="want adapters around layers, as LoRA's; got PEFT's P"
        ):
            fastprompt.patch(wrapped)
        assert not fastprompt.supports(wrapped)
    wrapped = lora(tiny.build("llama"))
    assert fastprompt.supports(wrapped).family == "llama"
    with pytest.raises(ValueError, match="want a model without adapters, got LORA"):
        fastprompt.patch(wrapped, LoRA(2))
    fastprompt.patch(wrapped, DeepPrompts(text=P))
    with pytest.raises(ValueError, match="patched already"):
        fastprompt.patch(wrapped)
