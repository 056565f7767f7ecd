"""`InstructionViT` in 4 bits, under Trainer, on disk; encoders from files, features kept."""

import copy
import importlib.util
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from encoders import (
    NAMES,
    SIDE,
    ToyEncoder,
    build,
    clip_folder,
    exemplars,
    images,
    open_clip_files,
)  # fmt: skip

from fastprompt.instruction import (
    FeatureCache,
    InstructionViT,
    OpenClipEncoder,
    TransformersClipEncoder,
)
from fastprompt.instruction.features import image_features, text_features


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_a_4bit_backbone(tmp_path):
    import transformers as tf

    tiny.vit().save_pretrained(tmp_path)
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    low = tf.ViTForImageClassification.from_pretrained(tmp_path, quantization_config=config)
    model = InstructionViT(low, ToyEncoder(), kind="text")
    model.set_classes(NAMES)
    model.eval()
    with torch.no_grad():
        first = model(images()).logits
    model.train()
    loss = model(images(), torch.tensor([0, 1, 2, 3])).loss
    loss.backward()
    assert model.tasks["default"].rows.grad.isfinite().all()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images()).logits, first)
    product = low.vit.layers[0].attention.q_proj
    assert "forward" in vars(product)
    model.release()
    assert "forward" not in vars(product)


def test_trainer_needs_nothing_else(tmp_path):
    import transformers as tf

    model = build(kind="text", train_k=3, top_k=3)
    data = [dict(pixel_values=p, labels=i % 7) for i, p in enumerate(images(14))]
    arguments = tf.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-3, gradient_checkpointing=True,
    )  # fmt: skip
    before = model.tasks["default"].rows.detach().clone()
    seen = []

    def compute_metrics(given):
        seen.append(given.predictions.shape)
        return {}

    trainer = tf.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics
    )
    trainer.train()
    assert not torch.equal(before, model.tasks["default"].rows)
    assert math.isfinite(trainer.evaluate()["eval_loss"]) and seen == [(14, 7)]


@pytest.mark.filterwarnings("ignore:predicting from a head")
@pytest.mark.parametrize("features", ["trainable", "frozen", "encoder"])
def test_save_and_load(features, tmp_path):
    model = build(kind="mixed", features=features, standardise=True)
    model.train()(images(), torch.arange(4))  # whose statistics are kept, too
    model.set_classes(["red", "blue"], exemplars(2), task="colours", head=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) * 0.1
    model.eval()
    model.save(tmp_path)
    fresh = build(kind="mixed", features=features, standardise=True, classes=["x", "y", "z"])
    fresh.load(tmp_path)
    fresh.eval()
    assert fresh.classes() == NAMES and fresh.classes("colours") == ["red", "blue"]
    assert torch.equal(fresh(images()).logits, model(images()).logits)
    new = dict(task="colours", predict="cosine")
    assert torch.equal(fresh(images(), **new).logits, model(images(), **new).logits)
    other = build(kind="text", features=features, classes=["x", "y", "z"])
    with pytest.raises(ValueError, match="kind: want 'mixed', got a model with 'text'"):
        other.load(tmp_path)
    assert other.classes() == ["x", "y", "z"]
    plain = build(kind="mixed", features=features)
    with pytest.raises(ValueError, match="standardise: want True, got a model with False"):
        plain.load(tmp_path)
    more = build(kind="mixed", features=features, standardise=True, classes=["x", "y", "z"])
    more.set_classes(["p", "q"], exemplars(2), task="own")
    more.set_classes(["p", "q"], exemplars(2), task="colours", head=True)
    own = more.tasks["own"].rows.detach().clone()
    more.load(tmp_path)  # another task stays, and a head that was not saved goes
    assert more.classes("own") == ["p", "q"] and torch.equal(more.tasks["own"].rows, own)
    assert set(more.heads) == {"default", "own"}
    with torch.no_grad():
        fresh.backbone.model.vit.layernorm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="was trained on another backbone"):
        fresh.load(tmp_path)
    with torch.no_grad():
        fresh.backbone.model.vit.layernorm.weight.div_(1.5)
    file = tmp_path / "instruction.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="want a whole safetensors file"):
        fresh.load(tmp_path)
    assert torch.equal(fresh(images()).logits, model(images()).logits)


def test_another_encoder_is_noticed(tmp_path):
    build(kind="text").save(tmp_path)
    torch.manual_seed(9)
    with pytest.raises(ValueError, match="encoder: want"):
        InstructionViT(tiny.vit(), ToyEncoder()).load(tmp_path)


# ---- encoders and features ----


def test_clip_of_transformers_from_files(tmp_path):
    import transformers as tf

    clip_folder(tmp_path)
    tokens = tf.AutoTokenizer.from_pretrained(tmp_path)
    encoder = TransformersClipEncoder(tf.CLIPModel.from_pretrained(tmp_path), tokens)
    names = ["cat", "dog"]
    got = text_features(encoder, names, ["a photo of a {class}.", "the {class}"])
    assert got.shape == (2, 24) and torch.allclose(got.norm(dim=1), torch.ones(2), atol=1e-6)
    both = tokens(["a photo of a cat.", "the cat"], padding=True, return_tensors="pt")
    pooled = encoder.model.text_model(**both).pooler_output
    want = F.normalize(encoder.model.text_projection(pooled), dim=-1).mean(0)
    assert torch.allclose(got[0], F.normalize(want, dim=-1), atol=1e-5)
    assert image_features(encoder, [images(2), images(3)], names).shape == (2, 24)
    model = build(encoder=encoder, classes=names, kind="mixed", features="encoder")
    model(images(), torch.tensor([0, 1, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in encoder.model.text_projection.parameters())


def test_clip_of_open_clip_from_files(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config, weights = open_clip_files(tmp_path)
    open_clip.add_model_config(config)
    model = open_clip.create_model("tiny-clip", pretrained=str(weights))
    encoder = OpenClipEncoder(model, lambda texts: open_clip.tokenize(texts, context_length=16))
    assert encoder.width == 24 and encoder.encode_images(images(2)).shape == (2, 24)
    both = build(lambda: open_clip.create_model("tiny-clip"), encoder=encoder, top_k=3)
    out = both.eval()(images(), details=True)
    assert out.logits.shape == (4, 7) and out.indices.shape == (4, 3)
    trains = build(encoder=encoder, features="encoder")
    trains(images(), torch.tensor([0, 1, 2, 3])).loss.backward()
    assert encoder.model.token_embedding.weight.grad.any()
    assert all(p.grad is None for p in encoder.model.visual.parameters())


def test_features_on_disk(tmp_path):
    encoder, decoded = ToyEncoder(), []

    def read(file):
        decoded.append(file.name)
        if b"bad" in file.read_bytes():
            raise OSError("cannot identify image file")
        return images(1, seed=int(file.read_bytes()))[0]

    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        file.write_bytes(str(i % 4).encode())  # the last is a copy of the first
    cache = FeatureCache(tmp_path / "cache", encoder, read, "v1")
    rows, places = cache.features(files)
    assert places == [0, 1, 2, 3, 4] and len(decoded) == 4 and torch.equal(rows[0], rows[4])
    with torch.no_grad():
        assert torch.allclose(rows[1], encoder.encode_images(images(1, seed=1))[0], atol=1e-5)
    again = FeatureCache(tmp_path / "cache", encoder, read, "v1")
    assert torch.equal(again.features(files)[0], rows) and len(decoded) == 4
    FeatureCache(tmp_path / "cache", encoder, read, "v2").features(files[:1])
    assert len(decoded) == 5
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.image.bias += 1
    FeatureCache(tmp_path / "cache", other, read, "v1").features(files[:1])
    assert len(decoded) == 6

    (tmp_path / "broken.png").write_bytes(b"bad")
    (tmp_path / "new.png").write_bytes(b"77")
    mixed = [tmp_path / "new.png", tmp_path / "broken.png", files[2]]
    with pytest.warns(UserWarning, match=r"broken.png was skipped"):
        rows, places = cache.features(mixed, bad="skip")
    assert places == [0, 2]
    with pytest.raises(ValueError, match=r"broken.png: want an image that can be decoded"):
        cache.features(mixed)
    with pytest.warns(UserWarning, match=r"gone.png was skipped"):
        assert cache.features([tmp_path / "gone.png", files[0]], bad="skip")[1] == [1]
    (tmp_path / "large.png").write_bytes(b"78")
    (tmp_path / "next.png").write_bytes(b"79")
    cache.preprocess = lambda f: torch.zeros(3, 16 + (f.name == "next.png"), 16)
    with pytest.raises(ValueError, match=r"next.png: want preprocess to give images of one size"):
        cache.features([tmp_path / "large.png", tmp_path / "next.png"])
    cache.preprocess = lambda f: torch.full((3, SIDE, SIDE), torch.nan)
    with pytest.raises(ValueError, match=r"got NaN or infinity for '.*large.png'"):
        cache.features([tmp_path / "large.png"])
