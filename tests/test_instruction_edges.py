"""`InstructionViT` under autocast, with numbers that are none, and what it refuses."""

import pooled
import pytest
import tiny
import torch
import torch.nn.functional as F
from encoders import NAMES, SIDE, ToyEncoder, build, images
from transformers import Trainer, TrainingArguments

from fastprompt import ops
from fastprompt.instruction import InstructionViT
from fastprompt.instruction.standard import Standard

LABELS = torch.tensor([0, 6, 3, 3])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])

# ---- autocast ----


@HALF
@pytest.mark.parametrize("train_k", [None, 3])
@pytest.mark.parametrize("kind", ["none", "text", "image", "mixed"])
def test_training_under_autocast(kind, train_k, dtype):
    model = build(kind=kind, standardise=True, train_k=train_k).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(images(), LABELS, details=True)
    out.loss.backward()
    assert kind == "none" or out.cosine_logits.dtype == torch.float32
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@HALF
@pytest.mark.parametrize("tokens", [(7, 24), (4, 7, 24)])
def test_cosines_are_float32s_under_autocast(tokens, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(4, 24, requires_grad=True), torch.randn(*tokens, requires_grad=True)]
    want = ops.cosine_logits(*inputs, 10.0)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    with torch.autocast("cpu", dtype=dtype):
        got = ops.cosine_logits(*inputs, 10.0)
        grads = torch.autograd.grad(got.square().sum(), inputs)
        exact = ops.cosine_logits(*inputs, 10.0, backend="reference")
    torch.testing.assert_close((got, *grads), (want, *wanted))
    torch.testing.assert_close(exact, want)


@HALF
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_the_choice_is_that_of_float32_under_autocast(backend, dtype):
    torch.manual_seed(0)
    query, keys = torch.randn(4, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    prompts = torch.randn(50, 8)
    run = lambda: ops.select_prompts(query, keys, prompts, 5, backend=backend)  # noqa: E731
    want = run()
    wanted = torch.autograd.grad(want[2].square().sum(), (query, keys))
    with torch.autocast("cpu", dtype=dtype):
        got = run()
        grads = torch.autograd.grad(got[2].square().sum(), (query, keys))
        exact = ops.select_prompts(query, keys, prompts, 5, backend="reference")
    torch.testing.assert_close((*got, *grads), (*want, *wanted))
    torch.testing.assert_close(exact, want)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(pixel_values=images()[i], labels=LABELS[i])


def test_trainer_in_bfloat16(tmp_path):
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, bf16=True, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(build(kind="mixed"), args, train_dataset=Pictures())
    assert 0 < trainer.train().training_loss < 20


# ---- what was standardised ----


@pytest.mark.filterwarnings("ignore:predicting from a head")
def test_cls_is_standardised_by_what_training_saw():
    model = build(kind="text", standardise=True).eval()
    labels = torch.arange(4)
    before = model(images(), labels, details=True)  # statistics are of training alone ...
    assert torch.allclose(before.logits, model.heads["default"](before.cls), atol=1e-5)
    model.train()
    seen = torch.cat([model(images(seed=s), labels, details=True).cls for s in range(3)])
    model.eval()
    out = model(images(), details=True)
    want = (out.cls - seen.mean(0)) / seen.std(0, correction=0)
    assert torch.allclose(out.logits, model.heads["default"](want), atol=1e-3)
    cosine = F.cosine_similarity(want[:, None], out.prompts, dim=-1) / model.temperature
    assert torch.allclose(out.cosine_logits, cosine, atol=1e-3)


def test_images_weigh_alike_in_batches_of_any_size():
    torch.manual_seed(0)
    standard, x = Standard(3), 2 * torch.randn(90, 3) + 5
    for part in x.split([40, 40, 9, 1]):
        standard(part, True)
    assert torch.allclose(standard.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(standard.var, x.var(0, correction=0), rtol=0.05)


def test_what_is_no_number_is_left_out():
    torch.manual_seed(0)
    standard, x = Standard(3), torch.randn(20, 3)
    standard(x, True)
    before = standard.mean.clone(), standard.var.clone()
    standard(torch.full((4, 3), torch.nan), True)
    assert torch.equal(standard.mean, before[0]) and torch.equal(standard.var, before[1])
    y = torch.randn(5, 3)
    y[2, 1] = torch.inf
    standard(y, True)
    both = torch.cat([x, y[[0, 1, 3, 4]]])
    assert torch.allclose(standard.mean, both.mean(0), atol=1e-5) and standard.images == 24


def test_one_image_has_no_deviation():
    standard = Standard(3)
    standard(torch.ones(1, 3), True)
    assert standard(torch.zeros(2, 3), False).abs().max() < 1.1


def test_statistics_stay_float32():
    model = build(kind="text", standardise=True).to(torch.bfloat16)
    assert all(x.dtype == torch.float32 for x in model.standard.buffers())


# ---- tasks ----


def test_a_task_set_in_evaluation_gets_its_head_in_training():
    model = InstructionViT(tiny.vit(), ToyEncoder(), kind="text").eval()
    model.set_classes(NAMES)
    assert not model.heads
    model.train().set_classes(NAMES)
    assert model(images(), LABELS).loss.requires_grad and "default" in model.heads


def test_rows_kept_of_old_classes_go_with_them():
    model = build(kind="text").eval()
    with torch.no_grad():
        model(images())
    assert model._kept_rows
    model.set_classes(NAMES[::-1])
    assert not model._kept_rows


# ---- refusals ----


def flags(model):
    return [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(projection=False), "projection: want one from 24 to 32, got False"),
        (dict(alignment=-1.0), "alignment: want a finite number of at least 0, got -1"),
        (dict(alignment=float("nan")), "alignment: want a finite number"),
        (dict(temperature=float("inf")), "temperature: want a finite number above 0, got inf"),
        (dict(token_scale=float("nan")), "token_scale: want a finite number above 0, got nan"),
    ],
)
def test_refused_options_leave_the_models_alone(options, message):
    backbone, encoder = tiny.vit(), ToyEncoder()
    before = flags(backbone), flags(encoder), backbone.training, encoder.training
    with pytest.raises(ValueError, match=message):
        InstructionViT(backbone, encoder, kind="text", **options)
    assert before == (flags(backbone), flags(encoder), backbone.training, encoder.training)


def test_a_4bit_backbone_cannot_train():
    backbone = tiny.vit()
    packed = torch.zeros(4, dtype=torch.uint8)
    backbone.register_parameter("packed", torch.nn.Parameter(packed, requires_grad=False))
    with pytest.raises(ValueError, match="train_backbone: want a dense backbone, got a 4-bit one"):
        InstructionViT(backbone, ToyEncoder(), kind="text", train_backbone=True)


def test_rotary_backbones_are_refused():
    eva = pytest.importorskip("timm").models.Eva
    model = eva(
        img_size=SIDE, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0,
        use_rot_pos_emb=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="want learned positions, got Eva with rotary ones"):
        InstructionViT(model, ToyEncoder(), kind="text")


def test_pixels_are_cast_for_timm():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
    )
    model = InstructionViT(vit.bfloat16(), ToyEncoder(), kind="text")
    model.set_classes(NAMES)
    model.gradient_checkpointing_enable()
    assert vit.grad_checkpointing
    model.train()(images(), LABELS).loss.backward()


def test_refused_calls():
    model = build(kind="text")
    with pytest.raises(ValueError, match=r"names: want a list of class names, got \{"):
        model.set_classes({"cat", "dog"})
    with pytest.raises(ValueError, match=r"task: want a name .* got 5"):
        model.set_classes(NAMES, task=5)
    with pytest.raises(ValueError, match="task: want one of 'default'; got 5"):
        model(images(), task=5)
    with pytest.raises(ValueError, match=r"query: want \[4, 24\], got list"):
        build(kind="text", top_k=3).eval()(images(), query=[1.0])


def test_a_file_of_other_options_says_so(tmp_path):
    build(kind="text", temperature=0.02).save(tmp_path)
    with pytest.warns(UserWarning, match=r"saved with .*0\.02.*this model has .*0\.5"):
        build(kind="text", temperature=0.5).load(tmp_path)
    with pytest.raises(ValueError, match="standardise: want False, got a model with True"):
        build(kind="text", standardise=True).load(tmp_path)


@pytest.mark.parametrize("method", ["l2p", "dual", "coda"])
def test_a_pools_query_must_be_finite(method):
    _, patch, _ = pooled.patched("vit", pooled.METHODS[method])
    given = pooled.images("vit")
    given["pixel_values"][1] = torch.nan
    with pytest.raises(ValueError, match="query: want finite image features"):
        patch.model(**given)
    bad = torch.full((pooled.B, 32), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="query: want finite"), patch.query(bad):
        patch.model(**pooled.images("vit"))
