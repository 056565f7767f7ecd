"""The fused loss of patched language models: what it is, and when it runs."""

import contextlib
import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
from frozen import relative
from losses import NAMES, by_hand, gradients, is_fused, labelled, pair, small_chunks  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import fastprompt
from fastprompt.loss import FusedLoss

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, count):
    ours, theirs = pair(name)
    given = labelled(name)
    more = {} if count is None else dict(num_items_in_batch=count)
    got, base = ours(**given, **more), theirs(**given, **more)
    assert got.logits is None and "logits" not in got and base.logits is not None
    assert set(got) == set(base) - {"logits"}
    want = by_hand(base.logits, given["labels"], count)
    assert relative(got.loss, want) < 1e-10
    torch.testing.assert_close(got.loss.float(), base.loss)
    got.loss.backward()
    want.backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert b.any() and relative(a, b) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_never_less_accurate_than_twice_eager(name, dtype):
    truth = pair(name)[1]
    given = labelled(name)
    by_hand(truth(**given).logits, given["labels"]).backward()
    truth = gradients(truth)
    errors = []
    for model in pair(name, dtype):
        model(**labelled(name, dtype)).loss.backward()
        errors.append([(a - b).norm() for a, b in zip(gradients(model), truth, strict=True)])
    floor = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for ours, eager, want in zip(*errors, truth, strict=True):
        assert ours <= 2 * eager + floor * want.norm()


class Wide(TorchDispatchMode):
    """The most rows of any result as wide as the vocabulary, but for the weights'."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.rows = {p.data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.ndim > 1 and t.shape[-1] == 64:
                if t.data_ptr() in self.weights:
                    continue
                self.rows = max(self.rows, t.numel() // 64)
        return result


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_logits_are_never_whole(name):
    ours, theirs = pair(name, torch.float32)
    given, found = labelled(name, torch.float32, batch=3), []
    for model in (ours, theirs):
        kept = []
        with (
            Wide(model) as seen,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t) or t, lambda t: t
            ),
        ):
            model(**given).loss.backward()
        weights = {p.data_ptr() for p in model.parameters()}
        wide = [t for t in kept if t.shape[-1:] == (64,) and t.data_ptr() not in weights]
        found.append((seen.rows, len(wide)))
    assert found[0] == (3, 0)
    assert found[1][0] >= 27 and found[1][1]


def test_every_label_ignored():
    ours, theirs = pair("llama", torch.float32)
    given = labelled("llama")
    given["labels"].fill_(-100)
    assert all(model(**given).loss.isnan() for model in (ours, theirs))
    assert all(model(**given, num_items_in_batch=3).loss == 0 for model in (ours, theirs))


def test_logits_elsewhere():
    model, _ = pair("llama", torch.float32)
    given = labelled("llama", torch.float32)
    plain = {k: v for k, v in given.items() if k != "labels"}
    trained = model(**given).loss
    assert model(**plain).logits.shape == (2, 9, 64)  # no labels: Trainer's label smoothing
    with torch.no_grad():
        assert model(**given).logits is not None
    out = model.eval()(**given)
    torch.testing.assert_close(out.loss, trained)
    torch.testing.assert_close(out.loss, by_hand(out.logits, given["labels"]))
    assert out.logits.requires_grad
    assert model.train()(**given).logits is None  # and back
    as_tuple = model(**given, return_dict=False)
    torch.testing.assert_close(as_tuple[0], trained)
    assert all(not isinstance(t, torch.Tensor) for t in as_tuple[1:])
    positional = model(given["input_ids"], None, None, None, None, given["labels"])
    assert positional.logits is None and torch.equal(positional.loss, trained)
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**given, shift_labels=shifted).loss, trained)
    # after a forward that fails nothing is left behind
    with pytest.raises(IndexError):
        model(**dict(given, labels=given["labels"] + 999))
    assert model(**plain).logits.shape == (2, 9, 64)
    # nor after one that does not: neither a tensor, nor a head that gives no logits
    for labels in (given["labels"], given["labels"] + 999):
        with contextlib.suppress(IndexError):
            model(**dict(given, labels=labels))
        loss = fastprompt.patch_of(model).loss
        assert loss.hidden is None and loss.empty is None
        assert model.lm_head(torch.zeros(3, 32)).shape == (3, 64)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(how):
    model, _ = pair("llama", torch.float32)
    other, given = how(model), labelled("llama", torch.float32)
    assert torch.equal(other(**given).loss, model(**given).loss) and is_fused(other)
    fastprompt.patch_of(other).undo()
    assert other(**given).logits is not None and model(**given).logits is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_gradient_checkpointing(name):
    ours, theirs = pair(name)
    given = labelled(name)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours(**given).loss.backward()
    by_hand(theirs(**given).logits, given["labels"]).backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("autocast", [None, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_4bit_head(compute, autocast):
    Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    model = tiny.build("llama")
    head = Linear4bit(32, 64, bias=False, compute_dtype=compute, quant_type="nf4")
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head.to("cpu")
    models = model, copy.deepcopy(model)
    given, found = labelled("llama", torch.float32), []
    for each, logits in zip(models, (False, True), strict=True):
        torch.manual_seed(3)
        patch = fastprompt.patch(each, logits=logits)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = each.train()(**given)
        out.loss.backward()
        assert (out.logits is not None) == logits
        found.append([out.loss.detach(), *gradients(each)])
        patch.undo()
        assert "forward" not in vars(each.lm_head)
    (got, *ours), (want, *theirs) = found
    torch.testing.assert_close(got, want)  # the head's product is in the same dtype
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[autocast or compute]
    assert all(relative(a, b) < bound for a, b in zip(ours, theirs, strict=True))


def test_autocast():
    ours, theirs = pair("llama", torch.float32)
    given = labelled("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(**given), theirs(**given)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-3, rtol=1e-3)


# ---- Trainer ----


def trainer(model, folder, name="llama", **more):
    given = labelled(name, torch.float32, batch=6)
    rows = [{k: v[i] for k, v in given.items()} for i in range(6)]
    metrics = more.pop("compute_metrics", None)
    options = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=2,
        max_steps=3, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, seed=3,
        disable_tqdm=True, save_strategy="no", **more,
    )  # fmt: skip
    return Trainer(model, options, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)


@pytest.mark.parametrize(
    "more", [{}, dict(label_smoothing_factor=0.1), dict(gradient_accumulation_steps=2)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_trainer(name, more, tmp_path, monkeypatch):
    fused = []
    run = FusedLoss.__call__

    def watched(self, *args, **kwargs):
        fused.append(self.active)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(FusedLoss, "__call__", watched)
    found, seen = [], []

    def metrics(predictions):
        seen.append(predictions.predictions)
        first = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        return {"mean": float(first.mean())}

    for model in pair(name, torch.float32):
        fused.clear()
        with_metrics = trainer(model, tmp_path, name, compute_metrics=metrics, **more)
        with_metrics.train()
        trained = list(fused)
        result = with_metrics.evaluate()
        losses = [x["loss"] for x in with_metrics.state.log_history if "loss" in x]
        found.append([*losses, result["eval_loss"], result["eval_mean"]])
        smoothed = "label_smoothing_factor" in more
        ours = not fastprompt.patch_of(model).logits
        assert bool(trained) != smoothed and all(t == ours for t in trained)
        assert not any(fused[len(trained) :])  # evaluation has logits
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    for each in seen:
        first = each[0] if isinstance(each, tuple) else each
        assert first.shape == (6, 9, 64)
