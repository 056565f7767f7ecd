"""save and load: bitwise, complete, atomic; refusals leave model and files as they were."""

import json

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastprompt
from fastprompt.methods import M2PT, VPT, DeepPrompts

ALL = list(tiny.FAMILIES)


def trained(name, method=None):
    model = tiny.build(name)
    patch = fastprompt.patch(model, method)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_save_then_load_into_a_fresh_model_is_bitwise(name, patched_before, tmp_path):
    model, given = trained(name), tiny.inputs(name)
    fastprompt.save(model, tmp_path / "prompts")
    fresh = tiny.build(name)
    if patched_before:
        fastprompt.patch(fresh)
    patch = fastprompt.load(fresh, tmp_path / "prompts")
    for key, p in fastprompt.patch_of(model).trainable.items():
        assert torch.equal(patch.trainable[key], p)
    with torch.no_grad():
        assert torch.equal(tiny.output(name, fresh, given), tiny.output(name, model, given))


@pytest.mark.parametrize("name", ["llama", "llava", "vit"])
def test_a_state_dict_fills_another_patched_model(name, tmp_path):
    """torch's own way, backbone and all; keys that were kept of the old prompts are not read."""
    model, given = trained(name), tiny.inputs(name)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    other = tiny.build(name, seed=7)
    fastprompt.patch(other)
    with torch.no_grad():
        want = tiny.output(name, model, given)
        assert not torch.allclose(tiny.output(name, other, given), want)
        other.load_state_dict(torch.load(tmp_path / "whole.pt"))
        assert torch.equal(tiny.output(name, other, given), want)
    bare = tiny.build(name)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*fastprompt"):
        bare.load_state_dict(model.state_dict())


def test_the_file_holds_what_trains_and_nothing_else(tmp_path):
    model = trained("llava", M2PT(4, 3))
    path = fastprompt.save(model, tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(fastprompt.patch_of(model).trainable)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "card.json", path.name}
    card = json.loads((tmp_path / "card.json").read_text())
    assert card == fastprompt.read_card(tmp_path)
    assert card["method"] == M2PT(4, 3).card() and card["base"]["model_type"] == "llava"


def test_a_dense_and_a_half_precision_copy_are_the_same_base(tmp_path):
    fastprompt.save(trained("llama"), tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        fastprompt.load(tiny.build("llama", dtype), tmp_path)


def test_models_that_share_embeddings_are_told_apart_by_norms(tmp_path):
    fastprompt.save(trained("llama"), tmp_path)
    other = tiny.build("llama")
    with torch.no_grad():
        other.model.layers[1].input_layernorm.weight.mul_(1.5)
    refused(other, tmp_path, "other weights")


def refused(model, folder, message):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    patched = "_fastprompt_patch" in vars(model)
    with pytest.raises(ValueError, match=message):
        fastprompt.load(model, folder)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert ("_fastprompt_patch" in vars(model)) == patched


def test_refusals(tmp_path):
    folder = tmp_path / "p"
    path = fastprompt.save(trained("llama", DeepPrompts(text=4)), folder)
    refused(tiny.build("llama", seed=9), folder, "other weights")
    refused(tiny.build("qwen2"), folder, "was trained on a llama, got a qwen2")
    refused(tiny.build("vit"), folder, "want a text tower")
    refused(trained("llama", DeepPrompts(text=5)), folder, "text=4.*is patched with.*text=5")
    refused(tiny.build("llama"), tmp_path / "nowhere", "want prompts.safetensors or model.safe")
    with pytest.raises(ValueError, match="want a patched model"):
        fastprompt.save(tiny.build("llama"), tmp_path / "q")
    assert not (tmp_path / "q").exists()

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    first, *rest = tensors

    def write(changed):
        save_file(changed, path, metadata=metadata)

    write({k: tensors[k] for k in rest})
    refused(tiny.build("llama"), folder, f"missing .*{first}")
    write(tensors | {"other": torch.zeros(1)})
    refused(tiny.build("llama"), folder, "unknown .*other")
    write(tensors | {first: torch.zeros(3, 32)})
    refused(tiny.build("llama"), folder, r"want \[4, 32\], got \[3, 32\]")
    write(tensors)
    whole = path.read_bytes()
    for cut in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(tiny.build("llama"), folder, "want a whole safetensors file")
    save_file(tensors, path)
    refused(tiny.build("llama"), folder, "it has no card")
    card = json.loads(metadata["fastprompt"])
    partial = {k: v for k, v in card.items() if k != "base"}
    save_file(tensors, path, metadata={"fastprompt": json.dumps(partial | {"base": {}})})
    refused(tiny.build("llama"), folder, "want a whole card; it lacks a sample")
    card["method"] = {"name": "Prefix"}
    save_file(tensors, path, metadata={"fastprompt": json.dumps(card)})
    refused(tiny.build("llama"), folder, "method: want one of M2PT, VPT, .*got 'Prefix'")
    card["method"] = {"name": "VPT", "colour": 3}
    save_file(tensors, path, metadata={"fastprompt": json.dumps(card)})
    refused(tiny.build("llama"), folder, "method VPT.*colour")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = trained("vit", VPT(3))
    path = fastprompt.save(model, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with torch.no_grad():
        next(iter(fastprompt.patch_of(model).trainable.values())).zero_()
    with pytest.raises(OSError, match="no space"):
        fastprompt.save(model, tmp_path)
    assert path.read_bytes() == before
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "card.json", path.name}
