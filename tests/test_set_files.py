"""Prompt sets in files, with the projector or head that goes with each."""

import json

import pytest
import tiny
import torch

import fastprompt
from fastprompt.methods import M2PT, VPT, DeepPrompts

P = "model.multi_modal_projector.linear_1.weight"


def llava():
    """A patched LLaVA in float64, and an input."""
    model = tiny.build("llava", torch.float64)
    return fastprompt.patch(model, M2PT(2, 3)), tiny.inputs("llava", torch.float64)


@torch.no_grad()
def train(patch):
    for p in patch.trainable.values():
        p.add_(torch.randn_like(p))


@torch.no_grad()
def logits(patch, name, given):
    with patch.using(name):
        return patch.model(**given).logits


def other_run(folder, **options):
    """A run of its own on the same base model, with a projector of its own."""
    patch, given = llava()
    patch.add("theirs", **options)
    patch.use("theirs")
    train(patch)
    fastprompt.save(patch.model, folder)
    return logits(patch, "theirs", given)


def test_a_set_is_an_ordinary_checkpoint(tmp_path):
    patch, given = llava()
    patch.add("b", text_tokens=5)
    for name in ("b", "default"):
        patch.use(name)
        train(patch)
    want = {name: logits(patch, name, given) for name in patch.sets}
    for name in patch.sets:  # one in use and one not
        patch.save(name, tmp_path / name)
        fresh = tiny.build("llava", torch.float64)
        fastprompt.load(fresh, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(fresh(**given).logits, want[name])
    assert fastprompt.read_card(tmp_path / "b")["method"]["text_tokens"] == 5


def test_files_of_before_load_as_sets(tmp_path):
    """What `fastprompt.save` has always written."""
    patch, given = llava()
    train(patch)
    fastprompt.save(patch.model, tmp_path)
    want = logits(patch, None, given), logits(patch, "default", given)
    patch.load("again", tmp_path)
    assert patch.sets["again"].parts is None  # the projector is the patch's
    assert torch.equal(logits(patch, "again", given), want[1])
    with torch.no_grad(), patch.using(["again", None]):
        mixed = patch.model(**given).logits
    assert torch.allclose(mixed, torch.cat([want[1][:1], want[0][1:]]), rtol=1e-10, atol=1e-10)


def test_a_set_with_a_projector_of_its_own(tmp_path):
    want = other_run(tmp_path, vision_tokens=4)
    patch, given = llava()
    train(patch)
    ours, mine = patch.trainable[P].clone(), logits(patch, "default", given)
    patch.load("theirs", tmp_path)
    assert torch.equal(logits(patch, "theirs", given), want)
    assert torch.equal(patch.trainable[P], ours), "put back"
    with pytest.raises(ValueError, match=r"'theirs' came with .*projector.* of its own"):
        patch.using(["theirs", "default"]).__enter__()
    with torch.no_grad(), patch.using(["theirs", "theirs"]):
        assert torch.allclose(patch.model(**given).logits, want, rtol=1e-10, atol=1e-10)

    patch.use("theirs")
    theirs = patch.trainable[P].clone()
    assert not torch.equal(theirs, ours) and "projector of its own" in patch.report()
    assert torch.equal(logits(patch, "default", given), mine)  # which trains no more
    assert torch.equal(patch.trainable[P], theirs)
    train(patch)  # that set's projector, not the patch's
    trained = logits(patch, "theirs", given)
    patch.add("third")
    for name, value in (("default", mine), ("theirs", trained)):
        patch.save(name, tmp_path / name)
        patch.use(name)
        assert torch.equal(logits(patch, name, given), value)
        fresh = tiny.build("llava", torch.float64)
        fastprompt.load(fresh, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(fresh(**given).logits, value)
    patch.use("third")
    assert torch.equal(patch.trainable[P], ours)


@pytest.mark.parametrize("trains", [True, False])
def test_the_report_says_what_a_set_comes_with(trains):
    patch = fastprompt.patch(tiny.build("llava"), M2PT(2, 5, train_projector=trains))
    projector = f"{patch.anatomy.parts['projector']}.linear_1.weight"
    patch.add("b").parts = {projector: patch.model.get_parameter(projector).detach()}
    assert "  b  2 vision, 5 text rows, projector of its own" in patch.report()


def test_all_sets(tmp_path):
    other_run(tmp_path / "run")
    patch, given = llava()
    patch.add("b", text_tokens=5)
    patch.load("theirs", tmp_path / "run")
    for name in patch.sets:
        patch.use(name)
        train(patch)
    patch.use("b")
    patch.drop("default")
    want = {name: logits(patch, name, given) for name in patch.sets}
    fastprompt.save_sets(patch.model, tmp_path / "all")
    files = sorted(
        str(f.relative_to(tmp_path / "all")) for f in (tmp_path / "all").rglob("*.[js]*")
    )
    assert files == ["b/card.json", "b/prompts.safetensors", "sets.json",
                     "theirs/card.json", "theirs/prompts.safetensors"]  # fmt: skip
    for patched_before in (False, True):
        model = tiny.build("llava", torch.float64)
        if patched_before:
            fastprompt.patch(model, M2PT(2, 5))
        again = fastprompt.load_sets(model, tmp_path / "all")
        assert again.in_use == "b" and set(again.sets) == {"b", "theirs"}
        assert {n: each.parts is None for n, each in again.sets.items()} == dict(
            b=True, theirs=False
        )
        for name, value in want.items():
            assert torch.equal(logits(again, name, given), value)


def test_refusals(tmp_path):
    other_run(tmp_path / "run")
    patch, _ = llava()
    state = {n: t.clone() for n, t in patch.model.state_dict().items()}

    def refused(message, call):
        with pytest.raises(ValueError, match=message):
            call()
        assert list(patch.sets) == ["default"]
        assert all(torch.equal(state[n], t) for n, t in patch.model.state_dict().items())

    refused("name: want letters", lambda: patch.load("a b", tmp_path / "run"))
    refused("want prompts.safetensors or model", lambda: patch.load("a", tmp_path / "none"))
    for name, model, method, message in (
        ("dinov2", tiny.build("llava dinov2 qwen3"), M2PT(2, 3), "other weights"),
        ("seed", tiny.build("llava", seed=4), M2PT(2, 3), "other weights"),
        ("deep", tiny.build("llava"), DeepPrompts(text=3), "want prompts of M2PT, got DeepPrompts"),
        ("head", tiny.build("llava"), M2PT(2, 3, train_lm_head=True), "want a set that trains"),
    ):
        fastprompt.patch(model, method)
        fastprompt.save(model, tmp_path / name)
        refused(message, lambda name=name: patch.load("a", tmp_path / name))
    refused("want what save_sets wrote", lambda: fastprompt.load_sets(patch.model, tmp_path))

    fastprompt.save_sets(patch.model, tmp_path / "all")
    index = json.loads((tmp_path / "all/sets.json").read_text())
    (tmp_path / "all/sets.json").write_text(json.dumps(index | dict(in_use="other")))
    refused("the one in use", lambda: fastprompt.load_sets(patch.model, tmp_path / "all"))
    (tmp_path / "all/sets.json").write_text(json.dumps(index | dict(sets=["default", "gone"])))
    fresh = tiny.build("llava", torch.float64)
    with pytest.raises(ValueError, match="gone: want prompts"):
        fastprompt.load_sets(fresh, tmp_path / "all")
    assert "_fastprompt_patch" not in vars(fresh)
    patch.add("b")
    with pytest.raises(ValueError, match=r"no set but 'default', got .*'b'"):
        fastprompt.load_sets(patch.model, tmp_path / "all")


def test_a_frozen_projector_that_came_with_a_set(tmp_path):
    """It is no part of the base model: not in files, not in their checks, and not after undo."""
    method = DeepPrompts(text=3)
    models = [tiny.build("llava", torch.float64) for _ in range(3)]
    patches = [fastprompt.patch(model, method) for model in models]
    for patch in patches:
        train(patch)
    with torch.no_grad():
        for p in models[0].model.multi_modal_projector.parameters():
            p.add_(torch.randn_like(p))
    names = [n for n, _ in models[0].named_parameters() if "multi_modal_projector" in n]
    patches[0].given = tuple(names)
    fastprompt.save(models[0], tmp_path / "theirs")
    fastprompt.save(models[1], tmp_path / "plain")

    patch, given = patches[2], tiny.inputs("llava", torch.float64)
    base = tiny.build("llava", torch.float64).state_dict()
    patch.load("theirs", tmp_path / "theirs")
    patch.use("theirs")
    fastprompt.save(models[2], tmp_path / "a")
    patch.save("theirs", tmp_path / "b")
    patch.save("default", tmp_path / "c")
    patch.load("plain", tmp_path / "plain")  # while another projector is in place
    for name, file in (("theirs", "a"), ("theirs", "b"), ("default", "c"), ("plain", "plain")):
        fresh = tiny.build("llava", torch.float64)
        fastprompt.load(fresh, tmp_path / file)
        with torch.no_grad():
            assert torch.equal(fresh(**given).logits, logits(patch, name, given)), file
        fastprompt.patch_of(fresh).undo()
        assert all(torch.equal(base[n], t) for n, t in fresh.state_dict().items())
    assert patch.sets["plain"].parts is None
    patch.undo()
    assert all(torch.equal(base[n], t) for n, t in models[2].state_dict().items())


def test_sets_that_share_a_projector_share_it_again(tmp_path):
    other_run(tmp_path / "run")
    patch, given = llava()
    train(patch)
    patch.add("b")
    patch.load("theirs", tmp_path / "run")
    patch.use("theirs")
    want = {name: logits(patch, name, given) for name in patch.sets}
    fastprompt.save_sets(patch.model, tmp_path / "all")
    again = fastprompt.load_sets(tiny.build("llava", torch.float64), tmp_path / "all")
    assert again.in_use == "theirs"
    assert [n for n, each in again.sets.items() if each.parts is not None] == ["theirs"]
    for name, value in want.items():
        assert torch.equal(logits(again, name, given), value)
    with again.using(["default", "b"]):
        again.model(**given)


def test_a_projector_in_place_for_a_while_learns_nothing(tmp_path):
    other_run(tmp_path)
    patch, given = llava()
    patch.load("theirs", tmp_path)
    with patch.using(["default", "default"]):
        loss = patch.model(**given).logits.sum()
    loss.backward()
    assert patch.trainable[P].grad is not None
    patch.model.zero_grad()
    with patch.using("theirs"):
        assert not patch.model(**given).logits.requires_grad
    assert patch.trainable[P].requires_grad
    patch.use("theirs")
    with patch.using("default"):
        assert not patch.model(**given).logits.requires_grad
    assert patch.trainable[P].requires_grad


def test_nothing_is_read_or_written_inside_using(tmp_path):
    other_run(tmp_path)
    patch, _ = llava()
    patch.load("theirs", tmp_path)
    with patch.using("theirs"):
        for call in (
            lambda: patch.add("a"),
            lambda: patch.load("a", tmp_path),
            lambda: patch.save("default", tmp_path / "a"),
            lambda: fastprompt.save(patch.model, tmp_path / "a"),
            lambda: fastprompt.load(patch.model, tmp_path),
            lambda: patch.resident(0),
        ):
            with pytest.raises(ValueError, match="want to be outside of"):
                call()
    assert not (tmp_path / "a").exists() and list(patch.sets) == ["default", "theirs"]


def test_sets_of_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    patch, _ = llava()
    fastprompt.save_sets(patch.model, tmp_path)
    adapters = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(tiny.build("llava", torch.float64), adapters)
    fastprompt.patch(model, M2PT(2, 3)).add("b")
    with pytest.raises(ValueError, match="want a patch with no set but 'default'"):
        fastprompt.load_sets(model, tmp_path)


def test_a_set_named_as_the_list_of_them(tmp_path):
    patch, _ = llava()
    patch.add("sets.json")
    with pytest.raises(ValueError, match="want a set of another name"):
        fastprompt.save_sets(patch.model, tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_heads_of_their_own(tmp_path):
    """Of a classifier; a file of VPT's."""
    model, given = tiny.build("vit", torch.float64), tiny.inputs("vit", torch.float64)
    patch = fastprompt.patch(model, VPT(3))
    train(patch)
    fastprompt.save(model, tmp_path)
    with torch.no_grad():
        want = model(**given).logits
    train(patch)
    patch.load("a", tmp_path)
    assert torch.equal(logits(patch, "a", given), want)
    with pytest.raises(ValueError, match=r"'a' came with classifier\.weight"):
        patch.using(["a", "default"]).__enter__()
