"""Prompt sets from others: means, what is between, both one after another."""

import copy

import pytest
import tiny
import torch
import zoo
from prompt_sets import patched, randomize
from test_exactness import relative

import fastprompt
from fastprompt.concatenation import concatenate as write_rows
from fastprompt.methods import E2VPT, M2PT, DeepPrompts, PrefixTuning
from fastprompt.sets.algebra import average, concatenate, interpolate


@pytest.mark.parametrize("name", ["llama", "vit", "qwen2"])
def test_a_concatenation_is_both_sets_rows_written_one_after_the_other(name):
    model, given = tiny.build(name, torch.float64), tiny.inputs(name, torch.float64)
    tiny.in_float64(model)
    theirs = copy.deepcopy(model)
    patch = patched(name, model)
    a, b = patch.sets["long"], patch.sets["short"]
    both = patch.add("both", concatenate(a, b))
    written = write_rows(theirs, both.method)
    with torch.no_grad():
        for key, prompt in written.items():
            block = key.removesuffix(".fastprompt")
            rows = [each.prompts[block].tokens for each in (a, b)]
            prompt.tokens.copy_(torch.cat(rows))
        with patch.using("both"):
            got = tiny.output(name, model, given)
        assert relative(got, tiny.output(name, theirs, given)) < 1e-10
    assert both.method.lengths()[patch.anatomy.towers[0].kind] == sum(
        each.method.lengths()[patch.anatomy.towers[0].kind] for each in (a, b)
    )


def build_learned():
    return zoo.build("gpt2", torch.float64)


@pytest.mark.parametrize("name", ["vit", "llava"])
def test_the_blocks_keys_are_those_of_both(name):
    """Of images, where no place rotates keys: the union, as it is."""
    patch, given = patched(name), tiny.inputs(name, torch.float64)
    patch.add("both", concatenate(patch.sets["long"], patch.sets["short"]))
    seen = {}

    def keep(block, inputs, options):
        seen.setdefault(block, []).append(inputs[3:])

    from fastprompt.recorder import listening

    for own in ("long", "short", "both"):
        with torch.no_grad(), listening(keep), patch.using(own):
            patch.model(**given)
    first = next(iter(seen.values()))  # later blocks have other tokens, and the same prompts
    for a, b, both in zip(*first, strict=True):
        torch.testing.assert_close(torch.cat([a, b], dim=1), both, rtol=1e-12, atol=1e-12)


def test_means():
    patch = patched("llava")
    patch.add("more", vision=5, text=6)
    randomize(patch)
    a, b = patch.sets["long"], patch.sets["more"]
    half, t = average(a, b), interpolate(a, b, 0.25)
    for key, p in half.tensors().items():
        x, y = a.tensors()[key], b.tensors()[key]
        torch.testing.assert_close(p, (x + y) / 2)
        torch.testing.assert_close(t.tensors()[key], 0.75 * x + 0.25 * y)
    ends = [interpolate(a, b, t).tensors() for t in (0, 1)]
    for key in ends[0]:
        assert torch.equal(ends[0][key], a.tensors()[key])
        assert torch.equal(ends[1][key], b.tensors()[key])
    patch.add("half", half)
    patch.use("half")
    assert half.method == a.method and all(p.requires_grad for p in half.tensors().values())
    with torch.no_grad():
        next(iter(half.tensors().values())).add_(1.0)  # no memory is shared
        assert not torch.equal(*(next(iter(s.tensors().values())) for s in (half, average(a, b))))


@pytest.mark.parametrize("method", [PrefixTuning(3), E2VPT(2, 2)])
def test_keys_and_values_that_are_learned_as_they_are(method):
    name = "llama" if isinstance(method, PrefixTuning) else "vit"
    patch = fastprompt.patch(tiny.build(name, torch.float64), method)
    patch.add("b", num_tokens=4)
    randomize(patch)
    a, b = patch.sets["default"], patch.sets["b"]
    patch.add("both", concatenate(a, b))
    given = tiny.inputs(name, torch.float64)
    with torch.no_grad(), patch.using(["both", "b"]):
        mixed = tiny.output(name, patch.model, given)
    for i, own in enumerate(["both", "b"]):
        with torch.no_grad(), patch.using(own):
            one = tiny.output(name, patch.model, {k: x[i : i + 1] for k, x in given.items()})
        assert relative(mixed[i : i + 1], one) < 1e-10
    block, prompt = next(iter(patch.sets["both"].prompts.items()))
    assert prompt.length == a.prompts[block].length + b.prompts[block].length
    assert (
        relative(prompt.tokens, torch.cat([a.prompts[block].tokens, b.prompts[block].tokens])) == 0
    )


def test_lengths_by_block():
    patch = fastprompt.patch(tiny.build("llama"), DeepPrompts(text=(1, 2, 3), train_head=False))
    patch.add("b", text=2)
    both = patch.add("both", concatenate(patch.sets["default"], patch.sets["b"]))
    assert both.method.text == (3, 4, 5)
    assert [p.length for p in both.prompts.values()] == [3, 4, 5]
    patch.use("both")
    assert "3 prompt rows" in patch.report()


def test_lengths_given_in_other_ways():
    """A number, one for each block, or by layer, where a length of 0 may be left out."""
    ways = [2, (1, 2, 3), {0: 3, 1: 1, 2: 2}]
    for a in ways:
        for b in ways:
            model = tiny.build("llama")
            patch = fastprompt.patch(model, DeepPrompts(text=a, train_head=False))
            patch.add("b", text=b)
            both = patch.add("both", concatenate(patch.sets["default"], patch.sets["b"]))
            want = [sum(s.prompts[n].length for s in (patch.sets["default"], patch.sets["b"]))
                    for n in both.prompts]  # fmt: skip
            assert [p.length for p in both.prompts.values()] == want
            patch.use("both")
    for a, b in (({0: 2, 1: 0}, {0: 3}), ({0: 3}, {0: 2, 1: 0})):
        patch = fastprompt.patch(tiny.build("llama"), DeepPrompts(text=a, train_head=False))
        patch.add("b", text=b)
        both = patch.add("both", concatenate(patch.sets["default"], patch.sets["b"]))
        assert [p.length for p in both.prompts.values()] == [5]


def test_options_that_are_whole_numbers_are_no_lengths():
    patch = fastprompt.patch(build_learned(), PrefixTuning(3, position_offset=3, dropout=0))
    patch.add("b", num_tokens=2)
    both = patch.add("both", concatenate(patch.sets["default"], patch.sets["b"]))
    assert both.method == PrefixTuning(5, position_offset=3)


def test_refusals(tmp_path):
    patch = patched("llama")
    a, b = patch.sets["long"], patch.sets["short"]
    for message, call in (
        ("want one set or more, got none", lambda: average()),
        ("weights: want 2, one a set", lambda: average(a, a, weights=[1.0])),
        ("want sets of one method", lambda: average(a, b)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    patch.add("top", layers="top")
    with pytest.raises(ValueError, match=r"same blocks, got model\.layers\.0\..* in some"):
        concatenate(a, patch.sets["top"])
    other = fastprompt.patch(tiny.build("llama"), PrefixTuning(3))
    with pytest.raises(ValueError, match="rows, of one method; got DeepPrompts"):
        concatenate(a, other.add("x"))
    patches = [fastprompt.patch(tiny.build("llava"), M2PT(2, 3)) for _ in range(2)]
    with torch.no_grad():
        for p in patches[0].trainable.values():
            p.add_(1.0)
    fastprompt.save(patches[0].model, tmp_path)
    patches[1].load("own", tmp_path)
    with pytest.raises(ValueError, match="share the patch's projector or head"):
        average(patches[1].sets["own"])
