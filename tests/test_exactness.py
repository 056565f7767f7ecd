"""Side keys against literal row-writing concatenation, in float64, on every family."""

import copy

import pytest
import tiny
import torch
from conftest import DEVICE

import fastprompt
from fastprompt.concatenation import concatenate
from fastprompt.hooks import CountFromText
from fastprompt.methods import DeepPrompts

ALL = list(tiny.FAMILIES)
P = 5


def method_for(name, rows=P):
    text = name in tiny.LANGUAGE or name.endswith("_text") or name.startswith("llava")
    vision = name in ("vit", "dinov2") or name.endswith("_vision") or name.startswith("llava")
    return DeepPrompts(vision=rows * vision, text=rows * text, train_head=False)


def pair(name, exact=True, rows=P, dtype=torch.float64, **more):
    """The same model with side keys and with literal rows, and the same prompts in both."""
    ours = tiny.build(name, dtype, **more).to(DEVICE if dtype == torch.float32 else "cpu")
    if exact:
        tiny.in_float64(ours)
    theirs = copy.deepcopy(ours)
    method = method_for(name, rows)
    patch = fastprompt.patch(ours, method)
    written = concatenate(theirs, method)
    assert patch.prompts.keys() == written.keys()
    with torch.no_grad():
        for key, prompt in patch.prompts.items():
            written[key].tokens.copy_(prompt.tokens)
    return ours, theirs, patch, written


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32 rotation"])
@pytest.mark.parametrize("name", ALL)
def test_output_and_every_prompt_gradient(name, exact):
    ours, theirs, patch, written = pair(name, exact)
    given = tiny.inputs(name, torch.float64)
    got, want = tiny.output(name, ours, given), tiny.output(name, theirs, given)
    bound = 1e-10 if exact else 1e-6
    assert relative(got, want) < bound
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < bound, key
    assert relative(tiny.output(name, tiny.build(name, torch.float64), given), want) > 1e-3, (
        "the prompts do nothing"
    )


@pytest.mark.parametrize("name", ALL)
def test_the_same_through_the_kernels(name):
    """In float32, through the op's kernels on this machine's device."""
    ours, theirs, patch, written = pair(name, exact=False, dtype=torch.float32)
    given = {k: v.to(DEVICE) for k, v in tiny.inputs(name).items()}
    got, want = tiny.output(name, ours, given), tiny.output(name, theirs, given)
    assert relative(got, want) < 1e-4
    direction = torch.randn_like(want)
    got.backward(direction)
    want.backward(direction)
    for key, prompt in patch.prompts.items():
        assert relative(prompt.tokens.grad, written[key].tokens.grad) < 1e-3, key


@pytest.mark.parametrize("name", ALL)
def test_nothing_else_gets_a_gradient(name):
    model = tiny.build(name)
    patch = fastprompt.patch(model)
    tiny.output(name, model, tiny.inputs(name)).square().sum().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == set(patch.trainable)
    assert all(p.grad.any() for p in patch.trainable.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing_enable|reentrant).*")
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    def gradients(checkpointing):
        model = tiny.build(name, torch.float64)
        patch = fastprompt.patch(model, method_for(name))
        torch.manual_seed(3)
        for p in patch.trainable.values():
            p.data.normal_()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        given = tiny.inputs(name, torch.float64)
        out = tiny.output(name, model, given)
        out.square().sum().backward()
        return [out, *(p.grad for p in patch.trainable.values())]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*tiny.LANGUAGE, "clip_text", "llava", "llava dinov2 qwen3"])
def test_a_padded_batch_equals_its_rows_alone(name, side):
    if name == "clip_text" and side == "left":
        pytest.skip("learned positions count from the padding: CLIP pads at the right")
    model = tiny.build(name, torch.float64)
    fastprompt.patch(model, method_for(name))
    given = tiny.inputs(name, torch.float64, batch=2, length=11)
    lengths = [8, 11]
    mask = torch.zeros(2, 11, dtype=torch.long)
    ids = torch.full((2, 11), 0)
    places = [slice(11 - n, 11) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        ids[row, place], mask[row, place] = given["input_ids"][row, :n], 1
    padded = dict(given, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        together = tiny.output(name, model, padded)
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            one = {k: v[row : row + 1] for k, v in given.items()}
            one["input_ids"] = one["input_ids"][:, :n]
            one.pop("attention_mask", None)
            alone = tiny.output(name, model, one)[0]
            assert relative(together[row, place], alone) < 1e-6  # float32 rotation


@pytest.mark.parametrize("name", list(tiny.LANGUAGE))
def test_counting_positions_from_the_text_leaves_base_logits(name):
    model = tiny.build(name, torch.float64)
    tiny.in_float64(model)
    ids = torch.randint(6, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        hook = CountFromText()
        model.model.register_forward_pre_hook(hook, with_kwargs=True)
        hooked = model(input_ids=ids, attention_mask=mask).logits
    assert relative(hooked[mask.bool()], plain[mask.bool()]) < 1e-10


def greedy(model, given, steps):
    """Greedy decoding by whole forwards, no cache: what the literal form can do."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    extra = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **extra).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "none", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*tiny.LANGUAGE, "llava", "llava dinov2 qwen3"])
def test_generate_gives_the_reference_tokens(name, padded, cache):
    ours, theirs, *_ = pair(name)
    given = tiny.inputs(name, torch.float64, length=12)
    if padded:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :1] = 0
        given["input_ids"][0, 0] = 0
    steps = 6
    how = {
        "dynamic": {},
        "none": dict(use_cache=False),
        "static": dict(cache_implementation="static"),
    }
    with torch.no_grad():
        want = greedy(theirs, given, steps)
        got = ours.generate(
            **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
            pad_token_id=0, **how[cache],
        )  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ALL)
def test_no_prompt_rows_is_the_base_model(name):
    model, given = tiny.build(name), tiny.inputs(name)
    model.requires_grad_(False)  # torch.matmul's choice of product depends on this flag
    with torch.no_grad():
        base = tiny.output(name, model, given)
        fastprompt.patch(model, method_for(name, rows=0))
        assert torch.equal(tiny.output(name, model, given), base)


@pytest.mark.parametrize("previous", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "vit", "llava"])
def test_attention_weights(name, previous):
    ours, *_ = pair(name, **({} if name == "llava" else dict(attn_implementation=previous)))
    if name == "llava" or previous == "sdpa":
        with pytest.raises(ValueError, match="attn_implementation='eager'"):
            ours(**tiny.inputs(name, torch.float64), output_attentions=True)
        return
    out = ours(**tiny.inputs(name, torch.float64), output_attentions=True)
    N = out.attentions[0].shape[2]
    assert len(out.attentions) == 3
    assert all(w.shape[-1] == P + N for w in out.attentions)
    assert all(torch.allclose(w.sum(-1), torch.ones(1, dtype=w.dtype)) for w in out.attentions)
