"""Prompt sets come, go, take turns, wait and learn."""

import copy
import pickle

import pytest
import tiny
import torch
from prompt_sets import (
    build,
    inputs,
    kinds,
    mixed_and_alone,
    patched,
    randomize,
    row,
)
from test_exactness import relative
from test_families import four_bit, wide  # noqa: F401  (a fixture)

import fastprompt
from fastprompt.methods import L2P, M2PT, VPT, DeepPrompts, PrefixTuning
from fastprompt.ops import reference
from fastprompt.sets import mixed as mixing

# ---- training ----


def gradients(patch, name, given, names, checkpointing=None):
    """Of the set in use; backward is outside of `using`."""
    model = patch.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    with patch.using(names):
        out = tiny.output(name, model, given)
    out.square().sum().backward()
    grads = {n: p.grad for n, p in patch.trainable.items()}
    model.zero_grad()
    return grads


@pytest.mark.filterwarnings("ignore:.*reentrant.*")
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "other"])
@pytest.mark.parametrize(
    ("name", "memory"),
    [("llama", "speed"), ("llama", "low"), ("llama", "off"), ("llava", "balanced"),
     ("llava", "off"), ("gemma3_text", "auto")],
)  # fmt: skip
def test_the_set_in_use_alone_gets_gradients(name, memory, checkpointing):
    model, given = build(name), inputs(name)
    vision = kinds(name)[0]
    method = DeepPrompts(vision=3 * vision, text=3, train_head=False)
    patch = fastprompt.patch(model, method, memory=memory)
    patch.add("other", vision=2 * vision, text=5)
    randomize(patch)
    got = gradients(patch, name, given, ["other", "default"], checkpointing)
    want = gradients(patch, name, row(given, 1), "default")
    for key, grad in want.items():
        assert relative(grad, got[key]) < 1e-10, key
    assert all(
        p.grad is None and not p.requires_grad for p in patch.sets["other"].tensors().values()
    )


def test_checkpointing_that_could_not_tell_its_blocks_is_refused():
    patch = fastprompt.patch(build("siglip_vision"), VPT(3), memory="off")
    patch.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with (
        pytest.raises(ValueError, match="no gradient checkpointing"),
        patch.using(["default", None]),
    ):
        patch.model(**inputs("siglip_vision"))


def test_a_step_of_the_optimizer_moves_the_set_in_use(tmp_path):
    patch, given = patched("llama"), inputs("llama")
    before = {name: copy.deepcopy(each.tensors()) for name, each in patch.sets.items()}
    patch.use("long")
    optimizer = torch.optim.SGD(patch.param_groups(prompt_lr=0.1))
    assert {id(p) for p in patch.trainable.values()} == {
        id(p) for p in patch.model.parameters() if p.requires_grad
    }
    patch.model(**given).logits.square().mean().backward()
    optimizer.step()
    for name, each in patch.sets.items():
        for key, p in each.tensors().items():
            assert torch.equal(p, before[name][key]) == (name != "long")
            assert p.requires_grad == (name == "long")
    assert "6 prompt rows" in patch.report() and "long in use" in patch.report()
    assert "blocks  3 of 3 as one autograd node" in patch.report()


def test_prompts_that_change_are_seen():
    patch, given = patched("llama"), inputs("llama")
    with torch.no_grad(), patch.using(["long", "short"]):
        before = patch.model(**given).logits
        patch.sets["short"].prompts["model.layers.1"].tokens.add_(1.0)
        after = patch.model(**given).logits
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_attention_dropout_drops_from_whole_rows(name):
    """So seldom that nothing is dropped: what is left of it is how rows are made whole."""
    patch, given = patched(name), inputs(name)
    with torch.no_grad(), patch.using(["long", "short"]):
        want = tiny.output(name, patch.model, given)
        for module in patch.model.modules():
            for key in ("attention_dropout", "attn_dropout", "dropout"):
                found = getattr(module, key, None)
                if isinstance(found, torch.nn.Dropout):
                    found.p = 1e-12
                elif isinstance(found, float):
                    setattr(module, key, 1e-12)
        got = tiny.output(name, patch.model.train(), given)
    assert relative(got, want) < 1e-6


# ---- in, out, where ----


def test_sets_in_and_out():
    patch, given = patched("llama"), inputs("llama")
    assert list(patch.sets) == ["default", "long", "short"] and patch.in_use == "default"
    with torch.no_grad():
        want = {name: used(patch, name, given) for name in patch.sets}
        patch.use("long")
        patch.drop("default")
        patch.drop("short")
        assert list(patch.sets) == ["long"]
        assert torch.equal(patch.model(**given).logits, want["long"])
        patch.add("default")
        assert relative(used(patch, "default", given), want["default"]) > 1e-3
    with pytest.raises(ValueError, match="want prompts, or options"):
        patch.add("b", patch.sets["long"], text=3)


def used(patch, name, given):
    patch.use(name)
    return patch.model(**given).logits


def test_refusals():
    patch = patched("llava")
    for message, call in (
        ("name: want letters, digits", lambda: patch.add("a/b")),
        ("'long' is there already", lambda: patch.add("long")),
        ("want one of the sets default, long, short; got 'c'", lambda: patch.use("c")),
        ("want one of the sets", lambda: patch.using(["default", "c"]).__enter__()),
        ("want one of the sets", lambda: patch.drop("c")),
        ("'default' is in use", lambda: patch.drop("default")),
        ("DeepPrompts: .*unexpected keyword argument 'colour'", lambda: patch.add("a", colour=3)),
        ("want a set that trains and shows what", lambda: patch.add("a", train_head=True)),
        ("vision prompt: want a length of 0 or more, got -1", lambda: patch.add("a", vision=-1)),
        ("want a name for each row of the batch, got none", lambda: patch.using([]).__enter__()),
        ("resident: want a number", lambda: patch.resident(-1)),
        ("got 'default' itself", lambda: patch.add("a", patch.sets["default"])),
        ("want a prompt set, got a dict", lambda: patch.add("a", {})),
        (
            r"want \[3, 32\], got None|want None, got \[3, 32\]",
            lambda: patch.add("a", patched("llama").sets["default"]),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(patch.sets) == ["default", "long", "short"]
    with patch.using(["long", "short"]):
        for what in (lambda: patch.use("long"), lambda: patch.drop("long"),
                     lambda: patch.using("long").__enter__()):  # fmt: skip
            with pytest.raises(ValueError, match="want to be outside of"):
                what()
    patch.use("long")
    patch.undo()
    with pytest.raises(ValueError, match="one that was undone"):
        patch.add("a")
    baked = patched("llama")
    with pytest.raises(ValueError, match="bake: want one prompt set, got default, long, short"):
        fastprompt.bake(baked.model)
    baked.drop("long")
    baked.drop("short")
    fastprompt.bake(baked.model)
    with pytest.raises(ValueError, match="got one that is baked"):
        baked.add("a")
    for model, method, message in (
        (tiny.build("vit"), L2P(), "prompts that all images share"),
        (tiny.build("llava"), M2PT(2, 3, visual_prompts="raw"), "want visual_prompts='drop'"),
    ):
        with pytest.raises(ValueError, match=message):
            fastprompt.patch(model, method).add("a")
    text = fastprompt.patch(tiny.build("llava"), DeepPrompts(text=3))
    with pytest.raises(ValueError, match=r"want no prompt in .*vision.*, as the patch has none"):
        text.add("a", vision=2)


def test_sets_count_positions_alike(tmp_path):
    """A prefix of PEFT's lets the tokens of a GPT-2 begin elsewhere: for all sets or for none."""
    patch = fastprompt.patch(build("gpt2"), PrefixTuning(3))
    other = fastprompt.patch(build("gpt2"), PrefixTuning(3, position_offset=3))
    fastprompt.save(other.model, tmp_path)
    for add in (
        lambda: patch.load("a", tmp_path),
        lambda: patch.add("a", position_offset=3),
        lambda: other.add("a", position_offset=2),
        lambda: patch.add("a", copy.deepcopy(other.sets["default"])),
    ):
        with pytest.raises(ValueError, match=r"want positions from \d, as the patch's"):
            add()
    other.add("a", num_tokens=4)


def test_refresh_is_of_all_sets():
    patch, given = patched("llama"), inputs("llama")
    with torch.no_grad(), patch.using(["long", "short"]):
        before = patch.model(**given).logits
        for p in patch.sets["short"].tensors().values():
            p.data.neg_()
        patch.refresh()
        assert relative(patch.model(**given).logits, before) > 1e-3


def test_a_set_has_one_patch():
    patch, other = patched("llama"), patched("llama")
    for name in ("default", "short"):
        with pytest.raises(ValueError, match="got one of another patch"):
            patch.add("a", other.sets[name])
    assert all(p.requires_grad for p in other.sets["default"].tensors().values())
    state = torch.get_rng_state()
    patch.add("a", copy.deepcopy(other.sets["default"]))
    assert torch.equal(torch.get_rng_state(), state)
    short = other.sets["short"]
    other.drop("short")
    patch.add("b", short)
    other_long = other.sets["long"]
    other.undo()
    patch.add("c", other_long)


def test_sets_in_other_layers():
    model, given = build("llama"), inputs("llama")
    patch = fastprompt.patch(model, DeepPrompts(text=3, layers="top", train_head=False))
    patch.add("below", text=2, layers="bottom")
    randomize(patch)
    mixed, alone = mixed_and_alone(patch, "llama", given, ["below", "default"])
    assert relative(mixed, alone) < 1e-10
    patch.use("below")
    assert [hasattr(layer, "fastprompt") for layer in model.model.layers] == [True, True, False]
    assert sorted(patch.trainable) == [f"model.layers.{i}.fastprompt.tokens" for i in (0, 1)]
    with torch.no_grad():
        assert relative(tiny.output("llama", model, row(given, 0)), alone[:1]) < 1e-10
    patch.undo()
    assert not any(hasattr(layer, "fastprompt") for layer in model.model.layers)


def test_undo_gives_the_old_model_bitwise():
    model, given = tiny.build("llava"), tiny.inputs("llava")
    with torch.no_grad():
        before = model(**given).logits
    state = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    patch = fastprompt.patch(model, M2PT(2, 3))
    patch.add("a", text_tokens=5)
    patch.use("a")
    with torch.no_grad(), patch.using(["default", None]):
        model(**given)
    patch.undo()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    after = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    assert after == hooks
    with torch.no_grad():
        assert torch.equal(model(**given).logits, before)


def test_copies_and_pickles():
    patch, given = patched("llava"), inputs("llava")
    pickled = pickle.dumps(patch.model)
    mixed, _ = mixed_and_alone(patch, "llava", given, ["long", "short"])
    for twin in (copy.deepcopy(patch.model), pickle.loads(pickled)):
        other = fastprompt.patch_of(twin)
        assert torch.equal(mixed_and_alone(other, "llava", given, ["long", "short"])[0], mixed)
        with torch.no_grad():
            for p in other.sets["long"].tensors().values():
                p.zero_()
        assert torch.equal(mixed_and_alone(patch, "llava", given, ["long", "short"])[0], mixed)
    keys = patch.model.state_dict().keys()
    assert sum("fastprompt" in key for key in keys) == len(patch.prompts)


def test_sets_wait_in_the_hosts_memory():
    patch, given = patched("llama", build("llama", torch.float32)), inputs("llama", torch.float32)
    for name in "abc":
        patch.add(name, text=4)

    def resident():
        """Sets whose keys and values are kept."""
        return [n for n, each in patch.sets.items() if each.prompts["model.layers.0"]._cached]

    def forward(*names):
        with torch.no_grad(), patch.using(names):
            return patch.model(input_ids=given["input_ids"][:1].expand(len(names), -1)).logits

    first = forward("a", "b", "c", "default")
    assert resident() == ["default", "a", "b", "c"]
    patch.resident(2)
    assert resident() == ["default", "b", "c"]
    assert torch.equal(forward("a", "c"), first[[0, 2]])
    assert resident() == ["default", "a", "c"]
    forward("default", "b")
    assert resident() == ["default", "b", "c"]
    with pytest.raises(ValueError, match=r"at most 2 sets beside 'default' .*; got 3"):
        forward("a", "b", "c")
    patch.use("b")  # it stays, and the one before it is the newest beside it
    assert set(resident()) <= {"default", "b", "c"}
    forward("default", "a")
    assert "c" not in resident()
    patch.resident(None)
    assert torch.equal(forward("a", "b", "c", "default"), first)
    patch.resident(0)
    patch.use("c")
    with torch.no_grad():
        assert relative(patch.model(**row(given, 0)).logits, first[2:3]) < 1e-5


@pytest.mark.gpu
def test_paged_sets_leave_the_device():
    model = build("llama", torch.float32).cuda()
    patch = patched("llama", model)
    patch.resident(1)

    def devices():
        return {n: next(iter(s.tensors().values())).device.type for n, s in patch.sets.items()}

    assert devices() == dict(default="cuda", long="cpu", short="cuda")
    with torch.no_grad(), patch.using(["long", "default"]):
        model(**{k: x.cuda() for k, x in inputs("llama").items()})
    assert devices() == dict(default="cuda", long="cuda", short="cpu")


def test_one_set_costs_no_stack(monkeypatch):
    patch, given = patched("llama", build("llama", torch.float32)), inputs("llama", torch.float32)
    seen = []
    old = reference.prompt_attention_with_weights
    monkeypatch.setattr(
        "fastprompt.attention.prompt_attention",
        lambda *args, **options: seen.append(options) or old(*args, **_plain(options))[0],
    )
    with torch.no_grad(), patch.using("long"):
        patch.model(**given)
    assert not any("prompt_index" in options for options in seen)


def test_rows_without_prompts_stack_nothing_anew(monkeypatch):
    patch, stacked = patched("llama"), []
    own = mixing._stack
    monkeypatch.setattr(mixing, "_stack", lambda alone: stacked.append(1) or own(alone))
    with torch.no_grad(), patch.using(["long", None]):
        for _ in range(3):
            patch.model(**inputs("llama"))
    assert len(stacked) == len(patch.prompts)


def _plain(options):
    return {key: x for key, x in options.items() if key != "backend"}


def test_timms_models_take_turns():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        base = model(images)
        patch = fastprompt.patch(model, VPT(3, train_head=False))
        patch.add("b", num_tokens=5)
        randomize(patch)
        first = model(images)
        patch.use("b")
        assert relative(model(images), first) > 1e-3
        patch.use("default")
        assert torch.equal(model(images), first)
        with patch.disabled():
            assert relative(model(images), base) < 1e-5
        assert min(patch.check(dict(x=images)).values()) > 1e-3
    with pytest.raises(ValueError, match="using: want a model of transformers, got timm_vit"):
        patch.using(["b", None]).__enter__()
