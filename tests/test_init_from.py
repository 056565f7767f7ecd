"""Prompts that begin from other runs, rows, centres of activations, and other models."""

import pytest
import tiny
import torch
import zoo
from test_exactness import relative

import fastprompt
from fastprompt.methods import E2VPT, M2PT, VPT, DeepPrompts, PrefixTuning
from fastprompt.sets.beginning import kmeans, states_before

TEXT = DeepPrompts(text=3, train_head=False)


def rms(rows):
    return rows.square().mean(-1).sqrt()


def tokens(patch, name=None):
    return [p.tokens for p in patch.sets[name or patch.in_use].prompts.values()]


def test_another_run_of_another_depth_and_length(tmp_path):
    old = fastprompt.patch(tiny.build("llama", num_hidden_layers=12), DeepPrompts(text=5))
    fastprompt.save(old.model, tmp_path)
    patch = fastprompt.patch(tiny.build("llama"), TEXT)
    before = [t.clone() for t in tokens(patch)]
    patch.add("cropped", init_from=tmp_path)
    for got, i in zip(tokens(patch, "cropped"), (0, 6, 11), strict=True):  # not 0, 10, 2 as text
        assert torch.equal(got, tokens(old)[i][:3])
    assert all(map(torch.equal, tokens(patch), before))
    patch.add("repeated", text=12)
    fastprompt.init_from(patch, tmp_path, name="repeated", layers={"text": [1, 1, 10]})
    for got, i in zip(tokens(patch, "repeated"), (1, 1, 10), strict=True):
        assert torch.equal(got, tokens(old)[i].repeat(3, 1)[:12])
    fastprompt.init_from(patch, patch.sets["repeated"])
    for got, want in zip(tokens(patch), tokens(patch, "repeated"), strict=True):
        assert torch.equal(got, want[:3])


def test_a_run_of_two_towers_leaves_the_projector(tmp_path):
    old = fastprompt.patch(tiny.build("llava"), M2PT(4, 2))
    with torch.no_grad():
        for p in old.trainable.values():
            p.add_(1.0)
    fastprompt.save(old.model, tmp_path)
    patch = fastprompt.patch(tiny.build("llava", seed=3), M2PT(2, 3))
    others = {n: p.clone() for n, p in patch.trainable.items() if "fastprompt" not in n}
    fastprompt.init_from(patch, tmp_path)
    for kind, rows in ((0, 2), (1, 3)):
        name = next(n for n in patch.prompts if ("vision" in n) != kind)
        got, want = patch.prompts[name].tokens, old.prompts[name].tokens
        assert torch.equal(got, want.repeat(2, 1)[:rows])
    assert all(torch.equal(patch.trainable[n], p) for n, p in others.items())


def test_keys_and_values_too(tmp_path):
    for name, method, longer in (
        ("llama", PrefixTuning(3), PrefixTuning(5)),
        ("vit", E2VPT(3, 2), E2VPT(1, 4)),
    ):
        old = fastprompt.patch(tiny.build(name), method)
        fastprompt.save(old.model, tmp_path / name)
        patch = fastprompt.patch(tiny.build(name), longer)
        fastprompt.init_from(patch, tmp_path / name)
        for a, b in zip(patch.prompts.values(), old.prompts.values(), strict=True):
            for x, y in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(x, y[torch.arange(len(x)) % len(y)])


def test_class_features_begin_every_block():
    patch = fastprompt.patch(tiny.build("vit"), VPT(5))
    features = torch.randn(3, 32)
    with torch.no_grad():
        tiny.output("vit", patch.model, tiny.inputs("vit"))  # keys are kept
        before = patch.model(**tiny.inputs("vit")).logits
    fastprompt.init_from(patch, {"vision": features, "vit.layers.1": features[:1]})
    want = 0.1 * features / rms(features)[:, None]
    first, second, third = tokens(patch)
    torch.testing.assert_close(first, want[[0, 1, 2, 0, 1]])
    assert torch.equal(first, third)
    torch.testing.assert_close(second, want[[0] * 5])
    with torch.no_grad():
        assert not torch.equal(patch.model(**tiny.inputs("vit")).logits, before)


def test_centres_of_activations():
    model, given = tiny.build("llama"), tiny.inputs("llama", batch=4)
    patch = fastprompt.patch(model, TEXT)
    mask = torch.ones_like(given["input_ids"])
    mask[0, :5] = 0
    batches = [given | dict(attention_mask=mask, labels=given["input_ids"]), tiny.inputs("llama")]
    model.train()
    centres = kmeans(patch, batches)
    assert model.training and list(centres) == [f"model.layers.{i}" for i in range(3)]
    with torch.no_grad(), patch.disabled():
        model.eval()
        states = [model(**b, output_hidden_states=True).hidden_states for b in batches]
    for i, rows in enumerate(centres.values()):
        x = torch.cat([states[0][i][mask.bool()], states[1][i].flatten(0, 1)])
        assert len(x) == 36 - 5 + 18
        nearest = torch.cdist(x, rows).argmin(1)
        for j in range(3):  # each is the mean of what it is the nearest to
            torch.testing.assert_close(rows[j], x[nearest == j].mean(0), rtol=1e-4, atol=1e-4)
        assert nearest.bincount().tolist() == sorted(nearest.bincount().tolist(), reverse=True)
    patch.add("begun", init_from=centres)
    for got, rows in zip(tokens(patch, "begun"), centres.values(), strict=True):
        torch.testing.assert_close(got, 0.1 * rows / rms(rows)[:, None])
        assert torch.allclose(rms(got), torch.tensor(0.1))


def test_fewer_activations_than_rows():
    patch = fastprompt.patch(tiny.build("llama"), DeepPrompts(text=9))
    centres = kmeans(patch, [dict(input_ids=torch.tensor([[3, 4]]))])
    assert {len(rows) for rows in centres.values()} == {2}
    fastprompt.init_from(patch, centres)
    assert all(torch.equal(t[0], t[8]) and not torch.equal(t[0], t[1]) for t in tokens(patch))


def test_transfer_copies_where_widths_are_equal():
    old = fastprompt.patch(tiny.build("llama", num_hidden_layers=5), DeepPrompts(text=4))
    patch = fastprompt.patch(tiny.build("qwen2"), TEXT)
    left = fastprompt.transfer(old, patch)
    for got, i in zip(tokens(patch), (0, 2, 4), strict=True):
        assert torch.equal(got, tokens(old)[i][:3])
    assert list(left) == [f"model.layers.{i}" for i in range(3)] and set(left.values()) == {0.0}


def test_transfer_maps_by_least_squares():
    old = fastprompt.patch(tiny.build("llava", torch.float64), M2PT(2, 3))
    wide = dict(hidden_size=48, num_attention_heads=6)
    patch = fastprompt.patch(tiny.build("llama", torch.float64, **wide), TEXT)
    ids = torch.randint(6, 63, (8, 9))
    left = fastprompt.transfer(old, patch, dict(input_ids=ids), layers={"text": [0, 0, 2]})
    sources = states_before(old, blocks(old), dict(input_ids=ids))
    targets = states_before(patch, blocks(patch), dict(input_ids=ids))
    for i, layer in enumerate((0, 0, 2)):
        x = sources[f"model.language_model.layers.{layer}"]
        y = targets[f"model.layers.{i}"]
        W = torch.linalg.pinv(x) @ y
        rows = old.prompts[f"model.language_model.layers.{layer}.fastprompt"].tokens @ W
        assert relative(tokens(patch)[i], rows) < 1e-9
        assert abs(left[f"model.layers.{i}"] - float((x @ W - y).norm() / y.norm())) < 1e-9
        assert 0 < left[f"model.layers.{i}"] < 1


def blocks(patch):
    return patch.anatomy.tower("text").blocks


def test_a_run_of_a_model_without_a_config(tmp_path):
    pytest.importorskip("timm")
    patches = [fastprompt.patch(zoo.build("timm_vit"), VPT(2)) for _ in range(2)]
    fastprompt.save(patches[0].model, tmp_path)
    fastprompt.init_from(patches[1], tmp_path)
    for a, b in zip(*(p.prompts.values() for p in patches), strict=True):
        assert torch.equal(a.tokens, b.tokens)


def test_a_batch_that_a_prompted_tower_does_not_read():
    patch = fastprompt.patch(tiny.build("llava"), M2PT(2, 3))
    text = dict(input_ids=torch.randint(6, 63, (2, 9)))
    with pytest.raises(ValueError, match=r"want a batch that the vision tower reads, got \['input"):
        kmeans(patch, [text])


def test_refusals(tmp_path):
    patch = fastprompt.patch(tiny.build("llama"), TEXT)
    wide = dict(hidden_size=48, num_attention_heads=6)
    other = fastprompt.patch(tiny.build("llama", **wide), TEXT)
    fastprompt.save(other.model, tmp_path / "wide")
    fastprompt.save(fastprompt.patch(tiny.build("vit"), VPT(3)).model, tmp_path / "vit")
    fastprompt.save(
        fastprompt.patch(tiny.build("llama"), PrefixTuning(3)).model, tmp_path / "prefix"
    )
    ids = dict(input_ids=torch.randint(6, 63, (2, 9)))
    short = dict(input_ids=ids["input_ids"][:, 1:])
    vision = fastprompt.patch(tiny.build("vit"), VPT(3))
    prefix = fastprompt.patch(tiny.build("llama"), PrefixTuning(3))
    before = [t.clone() for t in tokens(patch)]
    begin = fastprompt.init_from
    for message, call in (
        ("found neither", lambda: begin(patch, tmp_path / "none")),
        (r"want rows \[3, 32\], got \[3, 48\]", lambda: begin(patch, tmp_path / "wide")),
        ("want a run of a llama, got one of a vit", lambda: begin(patch, tmp_path / "vit")),
        (r"want rows \[3, 32\], got \[3, 2,", lambda: begin(patch, tmp_path / "prefix")),
        (r"layers\['text'\]: want 3 of 0 .. 2, got \[0\]",
         lambda: begin(patch, patch.sets["default"], layers={"text": [0]})),
        (r"layers\['text'\]: want 3 of 0 .. 2, got \[0, 1, 3\]",
         lambda: begin(patch, patch.sets["default"], layers={"text": [0, 1, 3]})),
        (r"by kind of tower or prompted block, got \['vision'\]",
         lambda: begin(patch, {"vision": torch.randn(3, 32)})),
        (r"want rows \[3, 32\], got \[3, 31\]", lambda: begin(patch, {"text": torch.randn(3, 31)})),
        ("want one of the sets", lambda: begin(patch, {}, name="none")),
        ("init_from: want prompts that are rows of a block",
         lambda: begin(prefix, {"text": torch.randn(3, 32)})),
        ("want a batch or more", lambda: kmeans(patch, [])),
        ("kmeans: want prompts that are rows of a block", lambda: kmeans(prefix, [ids])),
        ("towers of the same kind", lambda: fastprompt.transfer(vision, patch)),
        ("want a batch that both models read", lambda: fastprompt.transfer(other, patch)),
        ("as many tokens in both batches, got 18 .* and 16",
         lambda: fastprompt.transfer(other, patch, ids, short)),
        ("transfer: want prompts that are rows", lambda: fastprompt.transfer(prefix, patch)),
        ("want prompts, or options or a start",
         lambda: patch.add("a", patch.sets["default"], init_from=tmp_path)),
        ("found neither", lambda: patch.add("a", init_from=tmp_path / "none")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
        assert all(map(torch.equal, tokens(patch), before)), message
    assert list(patch.sets) == ["default"]
