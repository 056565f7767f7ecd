"""Blocks on two devices, as a device map of several cards has them.

No card is here. Tensors without values stand for those of two: they know their device, and every
operation refuses to mix them. Their backward pass wants a card.
"""

import pytest
import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llava import modeling_llava

import fastprompt
from fastprompt.methods import L2P, M2PT, VPT, DeepPrompts

hooks = pytest.importorskip("accelerate.hooks")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CASES = {
    "llama": (DeepPrompts(text=3), ("model.layers.1", "model.layers.2", "model.norm", "lm_head")),
    "vit": (VPT(3), ("vit.layers.2", "vit.layernorm", "classifier")),
    "llava": (M2PT(2, 3), ("model.language_model", "lm_head")),
    "llava siglip mistral": (M2PT(2, 3), ("model.vision_tower",)),
}


def place(model, second):
    """Weights without values where a device map would put them, and accelerate's hooks."""
    for name, module in model.named_modules():
        inside = any(name == each or name.startswith(f"{each}.") for each in second)
        device = SECOND if inside else FIRST
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    learned = kind is module._parameters
                    kind[key] = nn.Parameter(empty, tensor.requires_grad) if learned else empty
        if not [*module.children()] or name in second or not name or "layers." in name:
            hook = hooks.AlignDevicesHook(device, io_same_device=not name)
            hooks.add_hook_to_module(module, hook)


def given_to(name):
    rows = tiny.inputs(name)
    rows.pop("attention_mask", None)  # a look at its values would be wanted
    return {k: torch.empty(x.shape, dtype=x.dtype, device=FIRST) for k, x in rows.items()}


@pytest.mark.parametrize("memory", ["off", "speed"])
@pytest.mark.parametrize("name", CASES)
def test_each_prompt_is_where_its_block_is(name, memory, monkeypatch):
    # what trains is a deep copy, which must not have a mode of its own
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    # transformers counts image tokens, and there are none
    monkeypatch.setattr(modeling_llava, "torch_compilable_check", lambda *said: None, raising=False)
    method, second = CASES[name]
    model = tiny.build(name)
    with FakeTensorMode():
        place(model, second)
        patch = fastprompt.patch(model, method, backend="vendor", memory=memory)
        for each in patch.prompts:
            block = model.get_submodule(each.removesuffix(".fastprompt"))
            assert len({p.device for p in block.parameters()}) == 1  # the prompt's among them
        assert {p.device for p in patch.trainable.values()} == {FIRST, SECOND}
        given = given_to(name)
        assert model.eval()(**given)[0].device == FIRST
        model.train()
        if name != "vit":
            given["labels"] = given["input_ids"]
        out = model(**given)
        assert out[0].device == FIRST and out[0].requires_grad


def test_rows_with_prompts_of_their_own():
    method, second = CASES["llama"]
    model = tiny.build("llama")
    with FakeTensorMode():
        place(model, second)
        patch = fastprompt.patch(model, method, backend="vendor")
        patch.add("other", text=5)
        with patch.using(["other", None]), torch.no_grad():
            assert model(**given_to("llama")).logits.device == FIRST


def test_a_pool_is_on_one_device():
    method, model = L2P(6, 2, 3), tiny.build("vit")
    with FakeTensorMode():
        place(model, CASES["vit"][1])
        with pytest.raises(ValueError, match="want all blocks on one device, where the pool"):
            fastprompt.patch(model, method)
