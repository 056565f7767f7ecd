"""Models whose modules accelerate has hooked: device maps, offloading to the host and to disk."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fastprompt
from fastprompt import loading, share
from fastprompt.methods import M2PT, VPT, DeepPrompts, FullTuning
from fastprompt.placement import offloaded

accelerate = pytest.importorskip("accelerate")
P = 3
METHODS = dict(llama=DeepPrompts(text=P), vit=VPT(P, train_head=False))


def on_cpu(model):
    """Hooks that only move inputs, as a device map of several devices has them."""
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offload(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


def filled(patch):
    torch.manual_seed(0)
    for p in patch.trainable.values():
        p.data.normal_()
    patch.refresh()
    return patch


def results(model, patch, name):
    """Outputs, and the gradients of all that trains, in training mode."""
    given = tiny.inputs(name)
    with torch.no_grad():
        out = [model.eval()(**given)[0]]
    model.train()
    if name == "vit":
        loss = model(**given)[0].square().mean()
    else:
        loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    return [*out, loss.detach(), *(p.grad for p in patch.trainable.values())]


def check(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_hooks_that_only_move_inputs_leave_blocks_fused(name):
    plain = tiny.build(name)
    hooked = on_cpu(copy.deepcopy(plain))
    patches = [filled(fastprompt.patch(m, METHODS[name])) for m in (plain, hooked)]
    want, got = (results(m, p, name) for m, p in zip((plain, hooked), patches, strict=True))
    check(got, want, rtol=0, atol=0)
    assert "blocks  3 of 3 as one autograd node" in patches[1].report()
    if name == "llama":
        assert "loss  at label positions alone" in patches[1].report()


@pytest.mark.parametrize("name", METHODS)
def test_offloaded_weights(name):
    """Blocks run as transformers has them, and nothing stays behind."""
    plain = tiny.build(name)
    hooked = offload(copy.deepcopy(plain))
    patches = [
        filled(fastprompt.patch(m, METHODS[name], memory=memory))
        for m, memory in ((plain, "off"), (hooked, "auto"))
    ]
    want, got = (results(m, p, name) for m, p in zip((plain, hooked), patches, strict=True))
    check(got, want)
    assert "is offloaded" in patches[1].report() and "blocks  0 of 3" in patches[1].report()
    places = offloaded(hooked)
    assert places and all(away.module._parameters[away.name].is_meta for away in places)


def test_generation_with_offloaded_weights():
    plain = tiny.build("llama").eval()
    hooked = offload(copy.deepcopy(plain))
    for model in (plain, hooked):
        filled(fastprompt.patch(model, METHODS["llama"]))
    ids = torch.arange(3, 9)[None]
    how = dict(max_new_tokens=6, do_sample=False, use_cache=True)
    assert hooked.generate(ids, **how).equal(plain.generate(ids, **how))


@pytest.mark.parametrize("place", [on_cpu, offload])
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("hooks_stay", [True, False])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_undo_gives_the_hooked_model_back(name, place, hooked_first, hooks_stay):
    from accelerate.hooks import remove_hook_from_submodules

    if place is offload and not hooked_first:
        pytest.skip("what is offloaded after the patch has hooks that hold its prompts, too")
    model, given = tiny.build(name).eval(), tiny.inputs(name)
    want = model(**given)[0]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = {name: set(vars(m)) for name, m in model.named_modules()}
    if hooked_first:
        place(model)
    method = M2PT(2, 3, train_projector=place is on_cpu) if name == "llava" else METHODS[name]
    patch = filled(fastprompt.patch(model, method))
    if not hooked_first:
        place(model)
    assert not torch.equal(model(**given)[0], want)
    if not hooks_stay:
        remove_hook_from_submodules(model)
        assert place is offload or not torch.equal(model(**given)[0], want)
    patch.undo()
    if hooks_stay or place is on_cpu:  # what was offloaded needs its hooks
        torch.testing.assert_close(model(**given)[0], want, rtol=0, atol=0)
    remove_hook_from_submodules(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    accelerates = {"forward", "hf_device_map", "to", "cuda"}  # and hook attributes, which are gone
    left = {n: set(vars(m)) - keys[n] - accelerates for n, m in model.named_modules()}
    assert not any(left.values()), left
    for module in model.modules():  # accelerate leaves the class's own there, bound
        own = vars(module).get("forward")
        assert own is None or own.__func__ is type(module).forward


def test_weights_on_disk(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2"), "cpu"
    )
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    load = AutoModelForCausalLM.from_pretrained
    plain = load(tmp_path / "model")
    mapped = load(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk"))
    assert mapped.model.layers[1].mlp.up_proj.weight.is_meta
    patches = [filled(fastprompt.patch(m, METHODS["llama"])) for m in (plain, mapped)]
    want, got = (results(m, p, "llama") for m, p in zip((plain, mapped), patches, strict=True))
    check(got, want)
    report = patches[1].report()
    assert "blocks  2 of 3" in report and "model.layers.1: " in report
    fastprompt.save(mapped, tmp_path / "prompts")
    fresh = load(tmp_path / "model").eval()
    fastprompt.load(fresh, tmp_path / "prompts")
    given = tiny.inputs("llama")
    torch.testing.assert_close(fresh(**given).logits, mapped.eval()(**given).logits)


class Double(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def loaded(folder, weights):
    options = dict(quantization_config=loading.four_bit(torch.float32))
    return AutoModelForCausalLM.from_pretrained(folder, **options if weights == "four_bit" else {})


@pytest.mark.parametrize("weights", ["dense", "four_bit"])
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("where", ["mlp.down_proj", "input_layernorm", "lm_head"])
def test_a_hook_of_anothers_runs(tmp_path, where, hooked_first, weights):
    """A block, or a loss, that skipped it would compute something else."""
    from accelerate.hooks import add_hook_to_module

    tiny.build("llama").save_pretrained(tmp_path)
    found = {}
    for kind in ("plain", "unhooked", "hooked"):
        model = loaded(tmp_path, weights)
        inside = [model] if where == "lm_head" else model.model.layers
        memory = "auto" if kind == "hooked" else "off"

        def hook(model=model, inside=inside, kind=kind):
            for part in inside:
                module = part.get_submodule(where)
                if kind == "hooked":
                    add_hook_to_module(module, Double())
                elif kind == "plain":  # the same by torch's own means
                    module.register_forward_hook(lambda m, args, out: 2 * out)

        if hooked_first:
            hook()
        patch = filled(
            fastprompt.patch(model, METHODS["llama"], memory=memory, logits=kind != "hooked")
        )
        if not hooked_first:
            hook()
        found[kind] = results(model, patch, "llama")
        if kind == "hooked":
            assert f"{where} is hooked by accelerate (Double)" in patch.report()
    check(found["hooked"], found["plain"])
    assert not torch.allclose(found["unhooked"][1], found["plain"][1])


def test_what_is_refused():
    whole = accelerate.cpu_offload(
        tiny.build("llama"), "cpu", preload_module_classes=["LlamaDecoderLayer"]
    )
    with pytest.raises(ValueError, match=r"model.layers.0: want it offloaded module by module"):
        fastprompt.patch(whole, METHODS["llama"])
    in_whole = dict(preload_module_classes=["LlavaMultiModalProjector"])
    for name, method, more in (
        ("llava", M2PT(2, 3), {}), ("llava", M2PT(2, 3), in_whole), ("llama", FullTuning(), {}),
    ):  # fmt: skip
        model = accelerate.cpu_offload(tiny.build(name), "cpu", **more)
        with pytest.raises(ValueError, match="want weights that stay, to train; got offloaded"):
            fastprompt.patch(model, method)
        assert not hasattr(model, "_fastprompt_patch")
    empty = tiny.build("llama").to("meta")
    with pytest.raises(ValueError, match=r"layers\.0: want weights with values, got a model"):
        fastprompt.patch(empty, METHODS["llama"])


def test_four_bit_weights_that_are_offloaded(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny.build("llama").save_pretrained(tmp_path)
    model = offload(loaded(tmp_path, "four_bit"))
    with pytest.raises(ValueError, match="want 4-bit weights on a device, got offloaded ones"):
        fastprompt.patch(model, METHODS["llama"])


def test_a_module_offloaded_as_a_whole_is_as_it_was_after_undo():
    model = tiny.build("llama")
    accelerate.cpu_offload(model, "cpu", preload_module_classes=["LlamaMLP"])
    patch = filled(fastprompt.patch(model, METHODS["llama"]))
    given = tiny.inputs("llama")
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in patch.trainable.values())
    patch.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_undo_leaves_frozen_what_peft_froze():
    peft = pytest.importorskip("peft")
    model = offload(tiny.build("llama"))
    patch = fastprompt.patch(model, METHODS["llama"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    patch.undo()
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n, _ in adapted.named_parameters() if "lora_" in n
    }


def test_tied_embeddings_that_are_offloaded_count_once():
    plain = tiny.build("llama", tie_word_embeddings=True)
    total = share.count(plain)
    model = offload(plain)
    assert share.count(model) == total and share.is_tied(model)


def test_a_trained_part_does_not_copy_what_its_hooks_hold():
    model = on_cpu(tiny.build("llava"))
    patch = fastprompt.patch(model, M2PT(2, 3))
    projector = model.model.multi_modal_projector
    old = next(what[2] for step, what in patch._undo if step == "module")
    for new, before in zip(projector.modules(), old.modules(), strict=True):
        if hasattr(new, "_hf_hook"):
            assert new._hf_hook.tied_params_map is before._hf_hook.tied_params_map


def test_outside_models_under_hooks():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=3
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for each in (copy.deepcopy(model), on_cpu(copy.deepcopy(model))):
        filled(fastprompt.patch(each, VPT(P)))
        outputs.append(each(images))
    check(*outputs, rtol=0, atol=0)


def test_weights_of_one_block_on_two_devices_are_not_fused():
    from fastprompt.blocks import checks
    from fastprompt.families import anatomy

    model = tiny.build("llama")
    (block, *_) = anatomy(model).towers[0].blocks
    block.layer.mlp.up_proj.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    why = checks.unknown(block.parts, checks.inside(block.layer, None))
    assert why == "its weights are on cpu and meta"


def test_rows_with_prompts_of_their_own_under_offloading():
    plain = tiny.build("llama").eval()
    models = plain, offload(copy.deepcopy(plain))
    logits = []
    for model in models:
        patch = filled(fastprompt.patch(model, METHODS["llama"]))
        patch.add("other", text=5)
        torch.manual_seed(1)
        for prompt in patch.sets["other"].prompts.values():
            prompt.tokens.data.normal_()
        with patch.using(["other", None]), torch.no_grad():
            logits.append(model(**tiny.inputs("llama")).logits)
    check(logits[1:], logits[:1])
