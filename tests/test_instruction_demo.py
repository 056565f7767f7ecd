"""The Instruction-ViT demo's own parts, on pictures made here; nothing is downloaded."""

import io
import json
import tarfile

import pytest
import torch
import transformers as tf
from encoders import ToyEncoder
from PIL import Image

from fastprompt.demo.instruction import (
    emoji,
    large_run,
    learning,
    models,
    pixels,
    plots,
    small,
    small_run,
)
from fastprompt.demo.instruction import encoder as encoders
from fastprompt.demo.instruction.learning import Recipe

ENTRY = dict(
    has_img_google=True, has_img_twitter=True, category="Objects", image="a.png", sort_order=2
)
LISTED = [
    ENTRY | dict(short_name="hot_pepper", image="a.png"),
    ENTRY | dict(short_name="owl", image="b.png", sort_order=1, category="Animals & Nature"),
    ENTRY | dict(short_name="flag-eg", category="Flags"),
    ENTRY | dict(short_name="new", has_img_twitter=False),
    ENTRY | dict(short_name="old", obsoleted_by="1F"),
]


def archive(path, artwork, shade):
    def add(name, data):
        info = tarfile.TarInfo(f"package/{name}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w:gz") as tar:
        add("emoji.json", json.dumps(LISTED).encode())
        for i, file in enumerate(("a.png", "b.png")):
            data = io.BytesIO()
            Image.new("RGBA", (64, 64), (shade, 10 * i, 0, 128)).save(data, "PNG")
            add(f"img/{artwork}/64/{file}", data.getvalue())


@pytest.fixture
def archives(tmp_path, monkeypatch):
    import hashlib

    for artwork, shade in (("google", 200), ("twitter", 100)):
        path = tmp_path / f"emoji-datasource-{artwork}-{emoji.VERSION}.tgz"
        archive(path, artwork, shade)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(emoji.ARTWORK, artwork, digest)
    return tmp_path


def test_emoji_of_both_artworks(archives):
    got = emoji.load(archives)
    assert got.names == ["owl", "hot pepper"]  # Unicode's order; no flag, none drawn by one alone
    assert got.images["google"].shape == (2, 4, 64, 64)
    assert got.images["google"][0, :, 0, 0].tolist() == [200, 10, 0, 128]
    assert got.images["twitter"][1, :, 0, 0].tolist() == [100, 0, 0, 128]
    white = pixels.on_white(got.images["google"])
    assert torch.allclose(white[0, :, 5, 5], torch.tensor([227.4, 132.0, 127.0]) / 255, atol=2e-3)


def test_a_changed_archive_is_not_used(archives):
    path = archives / f"emoji-datasource-google-{emoji.VERSION}.tgz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="not the pinned emoji-datasource-google"):
        emoji.load(archives)
    assert not [p for p in archives.iterdir() if p.is_dir()]


def test_augmented_pictures_are_pictures():
    art = torch.randint(256, (9, 4, 64, 64), dtype=torch.uint8)
    got = [pixels.augmented(art, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert got[0].shape == (9, 3, 64, 64) and got[0].min() >= 0 and got[0].max() <= 1
    assert torch.equal(got[0], got[1]) and not torch.equal(got[0], got[2])
    assert pixels.normalised(got[0]).shape == (9, 3, 56, 56)


def test_digits_stand_in_for_fashion(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(small, "FASHION", tmp_path / "none")
    data = small.load(50, 30, 20)
    assert data.name == "digits" and data.train.images.shape == (50, 3, 8, 8)
    assert len(data.validation.labels) == 30 and len(data.test.labels) == 20
    assert data.train.images.max() <= 1
    most = small.load(5000, 500, 1000)
    every = torch.cat([part.images for part in most[3:]]).flatten(1)
    assert len(every) == 1797 and len(most.test.labels) == 400  # all, and none twice
    from sklearn.datasets import load_digits

    assert every[:, :64].sum() * 16 == pytest.approx(load_digits().images.sum())


def test_baselines_find_what_is_there():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(3, 8)[labels] * 3 + torch.randn(60, 8) * 0.3
    for way in (learning.linear_probe, learning.nearest_prototype):
        assert learning.accuracy(way(x[:30], labels[:30], x[30:], 3), labels[30:]) == 1


def test_a_recipe_names_every_parameter_once(tiny_backbone):
    exemplars = [torch.randn(2, 24) for _ in range(4)]
    recipe = Recipe(head_lr=1.0, projection_lr=2.0, prompt_lr=3.0)
    for kind, rates in (("none", [1.0]), ("mixed", [1.0, 2.0, 3.0]), ("VPT", [1.0, 3.0])):
        model = models.build(kind, Toy(), ["a", "b", "c", "d"], exemplars, "a {class}")
        groups = recipe.groups(model)
        assert [group["lr"] for group in groups] == rates
        got = [id(p) for group in groups for p in group["params"]]
        assert sorted(got) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_fitted_map_brings_images_to_their_texts():
    torch.manual_seed(0)
    encoder = encoders.DualEncoder.__new__(encoders.DualEncoder)
    torch.nn.Module.__init__(encoder)
    encoder.register_buffer("mean", torch.zeros(12))
    encoder.register_buffer("map", torch.eye(12, 5))
    seen = torch.randn(200, 12)
    text = torch.nn.functional.normalize(seen - seen.mean(0), dim=1) @ torch.randn(12, 5)
    encoder.fit(seen, text, 1e-4)
    assert torch.allclose(encoder.mapped(seen), text, atol=1e-3)


@pytest.fixture
def tiny_backbone(monkeypatch):
    def backbone(cache=None, dtype=torch.float32):
        torch.manual_seed(0)
        config = tf.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
            image_size=56, patch_size=14,
        )  # fmt: skip
        return tf.Dinov2Model(config).eval()

    monkeypatch.setattr(encoders, "backbone", backbone)


class Toy(ToyEncoder):
    """The interface of the demo's encoder, without its weights."""

    dtype = torch.float32

    def seen(self, pixel_values):
        return pixel_values.flatten(2).mean(2)

    def mapped(self, seen):
        return seen @ torch.ones(3, self.width)

    def fit(self, seen, text, ridge):
        pass


def test_every_kind_is_built_and_trains(tiny_backbone):
    exemplars = [torch.randn(2, 24) for _ in range(4)]
    names = ["cat", "dog", "owl", "fox"]
    data = torch.randn(8, 3, 56, 56), torch.arange(8) % 4, None
    for kind in models.KINDS:
        model = models.build(kind, Toy(), names, exemplars, "a {class}").train()
        history = learning.train(model, lambda _: data, Recipe(steps=3), lambda: 0.5, (0, 3))
        assert len(history.losses) == 3 and history.accuracy == {0: 0.5, 3: 0.5}
        scores, _ = learning.logits(model, data[0], None, size=3)
        assert scores.shape == (8, 4) and scores.isfinite().all()
    encoder, rows = Toy(), {}
    for kind in ("text", "text shuffled", "random rows"):
        model = models.build(kind, encoder, names, exemplars, "a {class}")
        prompts = model.tasks["default"]
        rows[kind] = prompts.rows.detach()
        assert torch.allclose(prompts.keys, rows[kind][:, 0], atol=1e-6)  # chosen by what is shown
        assert torch.allclose(rows[kind].norm(dim=-1), torch.ones(4, 1), atol=1e-5)
    assert torch.equal(rows["text shuffled"], rows["text"].roll(1, 0))
    assert not torch.allclose(rows["random rows"], rows["text"], atol=0.1)


def test_the_small_parts_from_end_to_end(tiny_backbone, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(small, "FASHION", tmp_path / "none")
    said, recipe = [], Recipe(steps=2, batch=4)
    bench = small_run.Bench(Toy(), 60, 30, None)
    parts = dict(kinds=small_run.kinds(bench, recipe, 2, said.append))
    scores = parts["kinds"]["scores"]
    assert {*models.KINDS, "linear probe", "nearest prototype"} <= set(scores)
    assert len(parts["kinds"]["similarity"]) == 10 and len(scores["mixed"]["all"]) == 2
    monkeypatch.setattr(small_run, "CANDIDATES", dict(list(small_run.CANDIDATES.items())[-2:]))
    tried = small_run.recipes(bench, 2, ("none", "mixed"), said.append)
    assert set(tried["mixed"]) == {"token scale 0.3", "token scale 3"}
    parts["adapting"] = small_run.adapting(bench, recipe, (1, 2), said.append)
    assert set(parts["adapting"]["curves"]["text"]) == {0, 2}
    plots.draw(parts, tmp_path)
    assert (tmp_path / "kinds.png").exists() and (tmp_path / "adapting.png").exists()


def test_the_large_parts_from_end_to_end(tiny_backbone, tmp_path):
    torch.manual_seed(0)
    names = [f"thing {chr(97 + i)}" for i in range(20)]
    images = {
        name: torch.randint(256, (20, 4, 64, 64), dtype=torch.uint8)
        for name in ("google", "twitter")
    }
    art = large_run.Artwork(emoji.Emoji(names, ["A", "B"] * 10, images), Toy())
    assert len(art.new) == 4 and not set(art.new.tolist()) & set(art.base.tolist())
    said, recipe = [], Recipe(steps=2, batch=4)
    parts = dict(selection=large_run.selecting(art, recipe, (None, 3, 1), 10, None, said.append))
    assert list(parts["selection"]["by_k"]) == ["all", 3, 1] and len(said) == 5
    some = large_run.all_or_some(art, recipe, 18, None, said.append)
    assert set(some) == {"all", "by score", "at random"}
    found = large_run.base_and_new(art, recipe, None, said.append)
    assert {"base", "new", "harmonic mean"} <= set(found["mixed"])
    plots.draw(parts, tmp_path)
    assert (tmp_path / "selection.png").stat().st_size > 1000
