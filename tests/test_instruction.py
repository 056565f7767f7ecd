"""`InstructionViT`: losses, selection, tasks, refusals."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import torch.nn.functional as F
from encoders import NAMES, ToyEncoder, build, exemplars, images

from fastprompt import methods
from fastprompt.instruction import InstructionViT
from fastprompt.instruction.kept import kept_classes, kept_rows

# ---- losses and what trains ----


@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
def test_the_loss_is_the_papers(kind):
    model = build(kind=kind, alignment=0.7, temperature=0.2).eval()
    pixels, labels = images(), torch.tensor([0, 6, 3, 3])
    assert model(pixels, labels).to_tuple()[0] == model(pixels, labels, details=True).loss
    assert len(model(pixels, labels).to_tuple()) == 2  # Trainer gathers whatever is given
    out = model(pixels, labels, details=True)
    rows = model.gain * model.projection(model.tasks["default"].rows)
    cls, outputs = model.backbone(pixels, rows.flatten(0, 1)[None])
    outputs = outputs.view(4, len(NAMES), -1, 32).mean(2)
    cosine = F.cosine_similarity(cls[:, None], outputs, dim=-1) / 0.2
    head = model.heads["default"](cls)
    want = F.cross_entropy(head, labels) + 0.7 * F.cross_entropy(cosine, labels)
    assert torch.allclose(out.loss, want, atol=1e-6) and torch.allclose(out.logits, head)
    assert torch.allclose(out.cosine_logits, cosine, atol=1e-5)
    assert torch.allclose(model(pixels, predict="cosine").logits, cosine, atol=1e-5)
    both = head.log_softmax(-1) + cosine.log_softmax(-1)
    assert torch.allclose(model(pixels, predict="both").logits, both, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_of_low_precision_under_float32(dtype):
    model = InstructionViT(tiny.vit().to(dtype), ToyEncoder(), kind="mixed", standardise=True)
    model.set_classes(NAMES, exemplars())
    out = model.train()(images(), torch.tensor([0, 6, 3, 3]), details=True)
    out.loss.backward()
    trains = [p for p in model.parameters() if p.requires_grad]
    assert all(t.dtype == torch.float32 for t in (*trains, out.logits, out.cosine_logits, out.cls))
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trains)


@pytest.mark.parametrize(
    ("features", "trains"),
    [
        ("trainable", {"projection", "tasks", "heads"}),
        ("frozen", {"projection", "heads"}),
        ("encoder", {"projection", "heads", "encoder.text"}),
    ],
)
def test_what_trains(features, trains):
    model = build(kind="text", features=features)
    model(images(), torch.tensor([0, 1, 2, 3])).loss.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in got if not n.startswith(tuple(trains))} == set()
    assert all(any(n.startswith(part) for n in got) for part in trains)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == got
    whole = build(kind="text", features=features, train_backbone=True)
    whole(images(), torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(p.grad is not None for p in whole.backbone.model.vit.layers[0].parameters())


def test_an_encoder_that_trains_is_read_at_every_forward():
    model = build(features="encoder").eval()
    with torch.no_grad():
        before = model(images()).logits
        model.encoder.text.weight += torch.randn_like(model.encoder.text.weight)
        after = model(images()).logits
    assert not torch.allclose(before, after)


def test_no_prompts_at_all():
    model = build(kind="none")
    out = model(images(), torch.tensor([0, 1, 2, 3]), details=True)
    assert out.cosine_logits is None and out.logits.shape == (4, 7)
    out.loss.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {"heads.default.weight", "heads.default.bias"}
    with pytest.raises(ValueError, match="predict: want 'head' without prompts"):
        model(images(), predict="cosine")


def test_release_gives_the_modules_back():
    backbone, encoder = tiny.vit().train(), ToyEncoder().train()
    backbone.vit.layernorm.weight.requires_grad_(False)
    backbone.vit.embeddings.eval()
    parts = (backbone, encoder)
    before = [(p.requires_grad, p.clone()) for m in parts for p in m.parameters()]
    modes = [x.training for m in parts for x in m.modules()]
    model = InstructionViT(backbone, encoder).eval()
    model.set_classes(NAMES)
    model(images(), predict="cosine")
    assert not any(p.requires_grad for m in parts for p in m.parameters())
    model.release()
    after = [(p.requires_grad, p) for m in parts for p in m.parameters()]
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in zip(before, after, strict=True))
    assert modes == [x.training for m in parts for x in m.modules()]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("width", [24, 48])  # below and above the backbone's
def test_classes_enter_with_the_norm_of_the_backbones_own_tokens(scale, width):
    model = build(classes=[f"class {i}" for i in range(64)], encoder=ToyEncoder(width),
                  token_scale=scale, train_k=None, top_k=None)  # fmt: skip
    entered = []
    first = model.backbone.model.vit.layers[0]
    first.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    with torch.no_grad():
        model(images())
        rows = model._project(model.tasks["default"])
    norms = entered[0].norm(dim=-1)
    own, ours = norms[:, 65:].mean(), norms[:, 1:65].mean()
    assert 0.8 * scale < ours / own < 1.25 * scale
    if width <= 32:  # the map is orthogonal: angles are those of the encoder's space
        keys = model.tasks["default"].keys
        got = F.normalize(rows[:, 0], dim=-1)
        assert torch.allclose(got @ got.mT, keys @ keys.mT, atol=1e-5)


# ---- selection ----


def test_validation_sees_the_chosen_and_the_mean_of_the_rest():
    model = build(kind="mixed", top_k=3).eval()
    pixels = images(5)
    with torch.no_grad():
        out = model(pixels, details=True)
        query = model.encoder.encode_images(pixels)
        rows = model.gain * model.projection(model.tasks["default"].rows)
        keys = model.tasks["default"].keys
        order = F.cosine_similarity(query[:, None], keys, dim=-1).argsort(descending=True)[:, :3]
        assert (out.indices == order).all()
        for i in range(5):  # each alone, with its own tokens
            others = [c for c in range(7) if c not in order[i].tolist()]
            tokens = torch.cat([rows[order[i]], rows[others].mean(0, keepdim=True)])
            cls, outputs = model.backbone(pixels[i : i + 1], tokens.flatten(0, 1)[None])
            assert torch.allclose(out.cls[i], cls[0], atol=1e-5)
            want = outputs.view(4, 2, 32)[:3].mean(1)
            assert torch.allclose(out.prompts[i], want, atol=1e-5)
        by_cosine = model(pixels, predict="cosine").logits
        kept = torch.zeros(5, 7, dtype=torch.bool).scatter(1, order, True)
        assert (by_cosine.isfinite() == kept).all()
        given = model(pixels, query=query)
        assert torch.equal(given.logits, out.logits)


def test_all_is_what_selecting_all_gives():
    model = build(kind="text").eval()
    whole = model(images())
    model.top_k = 7
    assert torch.equal(model(images()).logits, whole.logits)
    model.top_k = 50  # a task may have fewer classes than are asked for
    assert torch.equal(model(images()).logits, whole.logits)


def test_evaluation_projects_the_classes_once():
    model = build(kind="text", top_k=2).eval()
    calls = []
    model.projection.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(images()).logits
        model(images())
        assert len(calls) == 1
        model.projection.weight.mul_(2)  # counted as a new version
        assert not torch.equal(model(images()).logits, first) and len(calls) == 2
    with torch.inference_mode():
        model(images())
    assert model(images()).logits.requires_grad and len(calls) == 3


def test_the_encoder_never_drops_anything_out():
    model = build(train_k=2).train()
    first = model(images(), details=True).indices
    assert not model.encoder.training and model.backbone.training
    assert all((model(images(), details=True).indices == first).all() for _ in range(3))


def test_kept_rows_have_no_graph_and_go_with_train_and_autocast():
    model = build(features="encoder", top_k=2).eval()
    with torch.no_grad():
        first = model(images()).logits
        assert not model._kept_rows["default"][1][0].requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            model(images())
        assert torch.equal(model(images()).logits, first)
        model.projection.weight.data.mul_(2)  # leaves no trace ...
        model.train().eval()  # ... but for this
        assert not torch.equal(model(images()).logits, first)


def test_classes_set_under_inference_mode():
    model = build(top_k=2).eval()
    with torch.inference_mode():
        model.set_classes(["ant", "ape", "asp"], task="more")
        assert model(images(), task="more", predict="cosine").logits.shape == (4, 3)
    model(images(), torch.tensor([0, 1, 2, 0]), task="more", predict="cosine").loss.backward()


def test_two_threads_share_a_model():
    model = build(kind="text", top_k=2).eval()
    pixels = [images(2, seed=s) for s in range(4)]
    with torch.no_grad():
        want = [model(p).logits for p in pixels]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                got = pool.map(lambda p: torch.no_grad()(model)(p).logits, pixels)
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_an_untrained_head_says_so():
    model = build().eval()
    with pytest.warns(UserWarning, match="head that was never trained"):
        model(images())
    for trained in (build(), model):  # having been asked before is no hindrance
        trained.train()(images(), torch.tensor([0, 1, 2, 3]))
        trained.eval()
        assert trained.heads["default"].has_trained
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained(images())


@pytest.mark.parametrize("others", ["score", "random"])
def test_training_keeps_the_true_class(others):
    torch.manual_seed(0)
    query, keys, labels = torch.randn(40, 8), torch.randn(9, 8), torch.randint(9, (40,))
    kept = kept_classes(query, keys, labels, 4, others)
    assert (kept == labels[:, None]).any(1).all()
    assert (kept.sort().values.diff() > 0).all()
    if others == "score":
        best = F.cosine_similarity(query[:, None], keys, dim=-1).topk(4).indices
        same = (best == labels[:, None]).any(1)
        assert (kept[same] == best[same]).all() and (kept[~same, :3] == best[~same, :3]).all()
    else:
        assert len({tuple(row.sort().values.tolist()) for row in kept}) > 10


def test_rows_kept_have_the_gradient_of_a_plain_gather():
    rows = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 5], [5, 2], [5, 0]])
    got = kept_rows(rows, indices)
    for b, own in enumerate(indices.tolist()):
        rest = rows[[c for c in range(6) if c not in own]].mean(0)
        assert torch.allclose(got[b], torch.cat([rows[own], rest[None]]), atol=1e-12)
    assert torch.autograd.gradcheck(lambda r: kept_rows(r, indices), rows)


@pytest.mark.parametrize("others", ["score", "random"])
def test_training_on_some_classes(others):
    model = build(kind="mixed", train_k=3, train_others=others, alignment=2.0)
    labels = torch.tensor([0, 6, 3, 3])
    out = model(images(), labels, details=True)
    place = (out.indices == labels[:, None]).int().argmax(1)
    want = F.cross_entropy(out.head_logits, labels) + 2 * F.cross_entropy(out.cosine_logits, place)
    assert torch.allclose(out.loss, want) and out.cosine_logits.shape == (4, 3)
    out.loss.backward()
    assert model.tasks["default"].rows.grad.abs().sum((1, 2)).all()  # the rest has its mean's share
    assert model.encoder.calls == (7 if others == "random" else 8)  # exemplars; the query once


def test_a_class_that_was_not_kept_has_nothing_to_align_with():
    model = build(kind="text", top_k=2).eval()
    out = model(images(), torch.tensor([0, 1, 2, 3]), details=True)
    hit = (out.indices == torch.arange(4)[:, None]).any(1)
    assert not hit.all()
    model.top_k = 1
    absent = torch.tensor([(int(i) + 1) % 7 for i in model(images(), details=True).indices[:, 0]])
    out = model(images(), absent, details=True)
    assert torch.allclose(out.loss, F.cross_entropy(out.head_logits, absent))


# ---- tasks ----


def test_new_classes_without_training():
    model = build(kind="mixed").eval()
    before = {n: p.clone() for n, p in model.projection.named_parameters()}
    model.set_classes(["red", "blue"], exemplars(2), task="colours")
    assert model.classes("colours") == ["red", "blue"] and model.classes() == NAMES
    logits = model(images(), task="colours", predict="cosine").logits
    assert logits.shape == (4, 2)
    with pytest.raises(ValueError, match="predict: want 'cosine' for 'colours', which has no head"):
        model(images(), task="colours")
    assert all((before[n] == p).all() for n, p in model.projection.named_parameters())
    head = model.heads["default"]
    model.set_classes(NAMES, exemplars())  # the same classes keep what was trained for them
    assert model.heads["default"] is head
    model.set_classes(["ant", "ape"], exemplars(2))
    assert model.classes() == ["ant", "ape"] and "default" not in model.heads


def test_one_model_on_two_data_sets():
    model = build(kind="text")
    model.set_classes(["red", "blue"], task="colours")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    first = None
    for _ in range(12):
        loss = model(images(), torch.tensor([0, 6, 3, 2])).loss
        loss = loss + model(images(seed=2), torch.tensor([0, 1, 1, 0]), task="colours").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.8 * first


# ---- refusals ----

REFUSED = {
    "kind": (dict(kind="texts"), "kind: want one of text, image, mixed, none; got 'texts'"),
    "features": (dict(features="all"), "features: want one of"),
    "predict": (dict(predict="cls"), "predict: want one of head, cosine, both"),
    "top_k": (dict(top_k=0), "top_k: want a whole number of at least 1"),
    "train_k": (dict(train_k=2.5), "train_k: want a whole number"),
    "temperature": (dict(temperature=0), "temperature: want a finite number above 0, got 0"),
    "token_scale": (dict(token_scale=0), "token_scale: want a finite number above 0, got 0"),
    "order": (dict(token_order="last"), "token_order: want one of"),
    "projection": (dict(projection=False), "projection: want one from 24 to 32"),
    "templates": (dict(templates="a {class}"), "templates: want a list"),
    "a template without a class": (dict(templates=["a thing"]), "templates: want '{class}'"),
    "encoder for images": (dict(kind="image", features="encoder"), "features='encoder': want kind"),
    "train_k 1": (dict(train_k=1), "train_k: want at least 2"),
    "none by cosine": (dict(kind="none", predict="cosine"), "predict: want 'head' without prompts"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refused_classes():
    model = InstructionViT(tiny.vit(), ToyEncoder(), kind="mixed")
    given = exemplars(2)
    for names, own, message in (
        ([], [], "names: want a list of class names"),
        ("cat", given, "names: want a list of class names"),
        (["cat", "cat"], given, "every class once, got 'cat' twice"),
        (["cat", " "], given, "a text for every class, got ' '"),
        (["cat", "dog"], None, "images: want exemplars of every class for kind='mixed'"),
        (["cat", "dog"], given[:1], "images: want exemplars of 2 classes, got 1"),
        (["cat", "dog"], [given[0], given[1][:0]], r"images of 'dog': want \[n, 3, H, W\]"),
        (["cat", "dog"], [given[0], torch.ones(2, 23)], "images of 'dog': want width 24, got 23"),
        (["cat", "dog"], [given[0], given[1] * torch.nan], "got NaN or infinity for 'dog'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_classes(names, own)
        assert not model.tasks
    with torch.no_grad():
        model.encoder.text.weight[ord("d")] = torch.nan
    with pytest.raises(ValueError, match=r"text features: want finite numbers.*'dog'"):
        model.set_classes(["ant", "dog"], given)


def test_refused_batches():
    model = build(kind="text", top_k=2).eval()
    with pytest.raises(ValueError, match="task: want one of 'default'; got 'other'"):
        model(images(), task="other")
    with pytest.raises(ValueError, match=r"labels: want 0 .. 6, got 0 .. 7"):
        model(images(), torch.tensor([0, 1, 2, 7]))
    with pytest.raises(ValueError, match=r"labels: want \[4\] int64"):
        model(images(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="query: want finite image features"):
        model(images() * torch.nan)
    with pytest.raises(ValueError, match="query: want finite image features"):
        model(images(), query=torch.full((4, 24), torch.nan))
    with pytest.raises(ValueError, match=r"query: want \[4, 24\], got \[3, 24\]"):
        model(images(), query=torch.ones(3, 24))
    for task in ("", "a.b", "train", "keys"):
        with pytest.raises(ValueError, match="task: want a name without a dot"):
            model.set_classes(["ant"], task=task)
    with pytest.raises(ValueError, match="set_classes first"):
        InstructionViT(tiny.vit(), ToyEncoder())(images())


def test_it_is_a_method():
    assert methods.InstructionViT is InstructionViT
