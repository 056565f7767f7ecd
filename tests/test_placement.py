"""Models whose modules accelerate has hooked: device maps, offloading to the host and to disk."""

import copy

import pytest
import tiny
import torch
from torch import nn

import fastprompt
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
    assert places and all(module._parameters[key].is_meta for module, key in places)


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
def test_undo_gives_the_hooked_model_back(place, hooked_first, hooks_stay):
    from accelerate.hooks import remove_hook_from_submodules

    if place is offload and not hooked_first:
        pytest.skip("what is offloaded after the patch has hooks that hold its prompts, too")
    model, given = tiny.build("llama").eval(), tiny.inputs("llama")
    want = model(**given)[0]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = {name: set(vars(m)) for name, m in model.named_modules()}
    if hooked_first:
        place(model)
    patch = filled(fastprompt.patch(model, METHODS["llama"]))
    if not hooked_first:
        place(model)
    assert not torch.equal(model(**given)[0], want)
    if not hooks_stay:
        remove_hook_from_submodules(model)
        assert place is offload or not torch.equal(model(**given)[0], want)
    patch.undo()
    if hooks_stay:
        torch.testing.assert_close(model(**given)[0], want, rtol=0, atol=0)
        remove_hook_from_submodules(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    left = {n: set(vars(m)) - keys[n] - {"forward"} for n, m in model.named_modules()}
    assert not any("_fastprompt" in key for each in left.values() for key in each)
    for module in model.modules():  # accelerate leaves the class's own there, bound
        own = vars(module).get("forward")
        assert own is None or own.__func__ is type(module).forward


def test_weights_on_disk(tmp_path):
    from transformers import AutoModelForCausalLM

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


def test_a_hook_of_anothers_runs():
    """A block that skipped it would compute something else."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    plain, hooked = tiny.build("llama"), tiny.build("llama")
    hooked.load_state_dict(plain.state_dict())
    for layer in plain.model.layers:
        layer.mlp.down_proj.weight.data *= 2
    for layer in hooked.model.layers:
        add_hook_to_module(layer.mlp.down_proj, Double())
    patches = [filled(fastprompt.patch(m, METHODS["llama"])) for m in (plain, hooked)]
    want, got = (results(m, p, "llama") for m, p in zip((plain, hooked), patches, strict=True))
    check(got, want)
    assert "down_proj is hooked by accelerate (Double)" in patches[1].report()


def test_what_is_refused():
    whole = accelerate.cpu_offload(
        tiny.build("llama"), "cpu", preload_module_classes=["LlamaDecoderLayer"]
    )
    with pytest.raises(ValueError, match=r"model.layers.0: want it offloaded module by module"):
        fastprompt.patch(whole, METHODS["llama"])
    for name, method in dict(llava=M2PT(2, 3), llama=FullTuning()).items():
        model = offload(tiny.build(name))
        with pytest.raises(ValueError, match="want weights that stay, to train; got offloaded"):
            fastprompt.patch(model, method)
        assert not hasattr(model, "_fastprompt_patch")
    empty = tiny.build("llama").to("meta")
    with pytest.raises(ValueError, match=r"layers\.0: want weights with values, got a model"):
        fastprompt.patch(empty, METHODS["llama"])


def test_weights_of_one_block_on_two_devices_are_not_fused():
    from fastprompt.blocks import checks
    from fastprompt.families import anatomy

    model = tiny.build("llama")
    (block, *_) = anatomy(model).towers[0].blocks
    block.layer.mlp.up_proj.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    why = checks.unknown(block.parts, checks.inside(block.layer, None))
    assert why == "its weights are on cpu and meta"
