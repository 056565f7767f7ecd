"""M2PT's `visual_prompts` on every served vision tower, against the literal form, in float64."""

import copy
import io
import pickle

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
import zoo
from encoders import tokenizer
from frozen import NF4, POLICIES, is_fused, quantize, relative
from transformers.modeling_outputs import BaseModelOutputWithPooling

import fastprompt
from fastprompt.blocks.frozen import _CHECKPOINTS_CALLS
from fastprompt.concatenation import concatenate
from fastprompt.families import HOSTS
from fastprompt.methods import M2PT
from fastprompt.tapping import rows_for

P = 3
# vision tower, language model, tapped layer; "raw" wants a block after it
CASES = [
    ("raw", "clip", "llama", -2),
    ("raw", "siglip", "mistral", 1),
    ("raw", "dinov2", "qwen3", -2),
    ("raw", "vit", "qwen2", -3),
    ("context", "clip", "llama", -2),
    ("context", "siglip", "mistral", -1),
    ("context", "dinov2", "qwen3", -2),
    ("context", "vit", "qwen2", 1),
]
if _CHECKPOINTS_CALLS:  # transformers 5.17's DINOv2 hands its blocks no keywords
    CASES = [case for case in CASES if case[1] != "dinov2"]


def name(case):
    return " ".join(map(str, case))


SHORT = [CASES[0], next(case for case in CASES if case[:2] == ("context", "clip"))]


def build(vision="clip", text="llama", tap=-2, dtype=torch.float64, exact=True):
    model = tiny.build("llava", dtype, vision=vision, text=text, tap=tap)
    if exact:
        tiny.in_float64(model)
    return model


def method(shown, text=2):
    return M2PT(P, text, visual_prompts=shown)


def given(dtype=torch.float64, rows=4 + P):
    torch.manual_seed(1)
    ids = torch.randint(6, 63, (2, rows + 5))
    ids[:, 1 : 1 + rows] = 5
    pixels = torch.randn(2, 3, 16, 16, dtype=dtype)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def literal(model, shown):
    """Literal rows, and the image as the released code (or the paper's figure) has it."""
    written = concatenate(model, method(shown))
    host, tap = model.model, model.config.vision_feature_layer
    front = int(model.config.vision_feature_select_strategy == "default")
    family = fastprompt.families.anatomy(model).tower("vision")
    last = family.blocks[-1]
    for p in host.multi_modal_projector.parameters():
        p.requires_grad_(True)
    if shown == "raw":
        block = family.unread[0]
        tokens = torch.zeros(P, 32, dtype=torch.float64)
        written[f"{block.name}.fastprompt"] = above = fastprompt.prompts.Prompt(tokens)
    else:
        prompt = written[f"{last.name}.fastprompt"]
        before = []
        last.layer.register_forward_pre_hook(lambda m, args: before.append(args[0]))

    def features(pixel_values, **_):
        state = host.vision_tower(pixel_values, output_hidden_states=True).hidden_states[tap]
        if shown == "raw":
            image = torch.cat([rows_for(above, state), state], dim=1)[:, front:]
        else:
            x = torch.cat([rows_for(prompt, state), before.pop()], dim=1)
            out = type(last.layer).forward(last.layer, x, None)
            image = torch.cat([out[:, :P], state[:, front:]], dim=1)
        return BaseModelOutputWithPooling(pooler_output=list(host.multi_modal_projector(image)))

    host.get_image_features = features
    return written


def pair(shown, vision, text, tap):
    ours = build(vision, text, tap)
    theirs = copy.deepcopy(ours)
    patch = fastprompt.patch(ours, method(shown))
    written = literal(theirs, shown)
    assert set(patch.prompts) == set(written)
    torch.manual_seed(2)
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens.normal_())
    return ours, theirs, patch, written


@pytest.mark.parametrize("case", CASES, ids=name)
def test_output_and_every_gradient(case):
    ours, theirs, patch, written = pair(*case)
    batch = given()
    got, want = ours.train()(**batch).logits, theirs(**batch).logits
    assert relative(got, want) < 1e-10
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert (
            prompt.tokens.grad.any()
            and relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-10
        ), key
    for name, p in theirs.model.multi_modal_projector.named_parameters():
        mine = ours.model.multi_modal_projector.get_parameter(name).grad
        assert relative(mine, p.grad) < 1e-10, name
    assert is_fused(ours) and not patch.unfused


@pytest.mark.parametrize("case", SHORT, ids=name)
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generated_tokens(case, how):
    ours, theirs, *_ = pair(*case)
    batch = given()
    with torch.no_grad():
        got = ours.generate(
            **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **how
        )
        ids = batch["input_ids"]
        for _ in range(4):
            logits = theirs(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("shown", ["raw", "context"])
def test_the_towers_own_states_stay_as_long_as_the_image(shown):
    """Direct calls of the tower see no prompt rows, also of a model asked for its states before."""
    model = build()
    pixels = given()["pixel_values"]
    tower = model.model.vision_tower
    tower(pixels, output_hidden_states=True)  # transformers' recorders stand before our hooks
    fastprompt.patch(model, method(shown))
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True)
        assert all(state.shape[1] == 5 for state in out.hidden_states)
        for of in (model, model.model):
            features = of.get_image_features(pixels, return_dict=True).pooler_output
            assert [len(image) for image in features] == [4 + P] * 2


@pytest.mark.parametrize("policy", [*POLICIES, "off"])
@pytest.mark.parametrize("kind", ["dense", NF4])
@pytest.mark.parametrize("shown", ["raw", "context"])
def test_memory_policies_and_4_bit(shown, kind, policy):
    results = []
    for memory in (policy, "off"):
        model = build()
        if kind == "nf4":
            model = quantize(model, torch.float64)
        patch = fastprompt.patch(model, method(shown), memory=memory)
        torch.manual_seed(3)
        with torch.no_grad():
            for p in patch.trainable.values():
                p.normal_()
        out = model.train()(**given()).logits
        out.square().mean().backward()
        results.append([out, *(p.grad for p in patch.trainable.values())])
        assert is_fused(model) == (memory != "off")
    assert all(relative(a, b) < 1e-10 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", ["auto", "off"])
@pytest.mark.parametrize("shown", ["raw", "context"])
@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
def test_gradient_checkpointing_changes_nothing(shown, memory, reentrant):
    results = []
    for checkpointing in (False, True):
        model = build()
        patch = fastprompt.patch(model, method(shown), memory=memory)
        torch.manual_seed(3)
        for p in patch.trainable.values():
            p.data.normal_()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = model(**given()).logits
        out.square().mean().backward()
        results.append([out, *(p.grad for p in patch.trainable.values())])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shown", ["raw", "context"])
def test_undo_saving_and_copies(shown, tmp_path):
    model, batch = build(), given()
    model.requires_grad_(False)
    short = given(rows=4)
    with torch.no_grad():
        base = model(**short).logits
        before = {n: set(vars(m)) for n, m in model.named_modules()}
        patch = fastprompt.patch(model, method(shown))
        want = model(**batch).logits
        fastprompt.save(model, tmp_path)
        fresh = build()
        fastprompt.load(fresh, tmp_path)
        assert torch.equal(fresh(**batch).logits, want)
        other = copy.deepcopy(model)
        for each in (other, pickle.load(io.BytesIO(pickle.dumps(copy_of_unrun(shown))))):
            for p in fastprompt.patch_of(each).trainable.values():
                p.add_(1.0)
            assert not torch.equal(each(**batch).logits, want)
            assert torch.equal(model(**batch).logits, want)
        patch.undo()
        assert torch.equal(model(**short).logits, base)
        fastprompt.patch_of(other).undo()
        torch.testing.assert_close(other(**short).logits, base)
    assert before == {n: set(vars(m)) for n, m in model.named_modules()}


def copy_of_unrun(shown):
    """A hook of transformers' own cannot be pickled after a forward."""
    model = build(exact=False)
    fastprompt.patch(model, method(shown))
    return model


@pytest.mark.parametrize("shown", ["raw", "context"])
def test_torch_compile_of_the_image_features(shown):
    model = build(dtype=torch.float32, exact=False)
    fastprompt.patch(model, method(shown))
    pixels = given(torch.float32)["pixel_values"]

    def image(pixels):
        return torch.stack(model.get_image_features(pixels).pooler_output)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(image, backend="eager")(pixels), image(pixels))


def processor(**more):
    words = tokenizer(["what", "is", "it"])
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        words,
        **{"patch_size": 8, "vision_feature_select_strategy": "default", **more},
    )


@pytest.mark.parametrize("vision, tap", [("clip", -2), ("siglip", 1)])
@pytest.mark.parametrize("shown", ["drop", "raw", "context"])
def test_prepare_makes_room_and_a_mismatch_says_so(shown, vision, tap):
    model = build(vision, tap=tap, dtype=torch.float32, exact=False)
    patch = fastprompt.patch(model, method(shown))
    own = int(vision == "clip")
    strategy = "default" if own else "full"
    made = processor(num_additional_image_tokens=own, vision_feature_select_strategy=strategy)

    def ids():
        image = np.zeros((16, 16, 3), dtype=np.uint8)
        batch = made(images=image, text="what is <image> it", return_tensors="pt")
        image_token = made.tokenizer.convert_tokens_to_ids("<image>")
        batch["input_ids"][batch["input_ids"] == image_token] = 5
        return batch

    if shown != "drop":
        with pytest.raises(ValueError, match=rf"want {P} image tokens more.*patch.prepare"):
            model(**ids())
    assert patch.prepare(made) is made and patch.prepare(made) is made  # twice is once
    count = (ids()["input_ids"] == 5).sum().item()
    assert count == 4 + P * (shown != "drop")
    with torch.no_grad():
        model(**ids())


@pytest.mark.parametrize("shown", ["raw", "context"])
@pytest.mark.parametrize("host", [h.name for h in HOSTS if h.name != "llava"])
def test_other_hosts_are_refused_by_name_and_stay_as_they_were(host, shown):
    model = zoo.build(host)
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"visual_prompts='{shown}': want a LLaVA .*, got {host},"):
        fastprompt.patch(model, method(shown))
    assert before == {n: set(vars(m)) for n, m in model.named_modules()}
    assert flags == [p.requires_grad for p in model.parameters()]


def test_refusals():
    def refused(message, how, **more):
        with pytest.raises(ValueError, match=message):
            fastprompt.patch(build(**more), how)

    refused("want one of drop, raw, context; got 'rows'", M2PT(P, 2, visual_prompts="rows"))
    refused("'raw': want vision_tokens of 1 or more", M2PT(0, 2, visual_prompts="raw"))
    refused(r"'context': want one tapped layer, got .*\[1, -2\]", method("context"), tap=[1, -2])
    refused("'raw'.* and a block after it; got .*-1 of 3", method("raw"), tap=-1)
    refused("'context': want the output of a block tapped; got", method("context"), tap=0)
    if _CHECKPOINTS_CALLS:
        refused("hands keywords on to its blocks; dinov2", method("raw"), vision="dinov2")
    model = build()
    patch = fastprompt.patch(model, method("raw"))
    with pytest.raises(ValueError, match="want vision_feature_layer -2, as at patching; got -1"):
        model(**given(), vision_feature_layer=-1)
    with pytest.raises(ValueError, match="want a LlavaProcessor, got"):
        patch.prepare(tokenizer(["a"]))
    llama = tiny.build("llama")
    with pytest.raises(ValueError, match="prepare: want a vision-language model, got llama"):
        fastprompt.patch(llama).prepare(processor())


@pytest.mark.parametrize("shown", ["raw", "context"])
def test_the_report_says_what_the_projector_sees(shown):
    model = build()
    report = fastprompt.patch(model, method(shown)).report()
    how = {"raw": "for the projector alone", "context": "as tokens, seen by the projector"}[shown]
    assert f"3 prompt rows {how} × 1 of 3 blocks" in report
    assert ("nothing reads its output" in report) == (shown == "context")
