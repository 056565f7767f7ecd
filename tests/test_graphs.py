"""Steps in CUDA graphs: on a card the same losses; here the logic, by a stand-in for graphs."""

import contextlib

import pytest
import tiny
import torch
from conftest import DEVICE
from transformers import Trainer, TrainingArguments

import fastprompt
from fastprompt import graphs
from fastprompt.graphs import GraphedStep, GraphedTrainer


class FakeGraph:
    """Replays by running again, on the inputs and gradients that it was captured with."""

    capturing = None

    def replay(self):
        step, inputs, loss = self.what
        loss.copy_(step.run(**inputs))


@pytest.fixture
def fake(monkeypatch):
    """The CPU taken for a card. Under capture nothing is computed, so gradients are put back."""
    captured = []

    @contextlib.contextmanager
    def capture(graph):
        step = captured[-1]
        before = {p: p.grad.clone() for p in step.parameters if p.grad is not None}
        yield
        for p, old in before.items():
            p.grad.copy_(old)

    original = GraphedStep._capture

    def remember(step, batch, tensors):
        captured.append(step)
        made = original(step, batch, tensors)
        made.graph.what = (step, made.inputs, made.loss)
        return made

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(GraphedStep, "_capture", remember)
    monkeypatch.setattr(graphs, "_on_a_card", lambda tensors: True)
    for name, value in dict(
        CUDAGraph=FakeGraph,
        graph=capture,
        Stream=lambda device: Stream(),
        current_stream=lambda device: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


def patched():
    torch.manual_seed(0)
    model = tiny.build("llama", torch.float32).to(DEVICE)
    return model, fastprompt.patch(model)


def batches(count=5):
    torch.manual_seed(1)
    rows = [torch.randint(4, 60, (2, 7 + i % 2), device=DEVICE) for i in range(count)]
    return [dict(input_ids=ids, labels=ids) for ids in rows]


def losses(graphed, set_to_none=True, accumulate=1):
    """Of a short training, in graphs or not."""
    model, patch = patched()
    model.train()

    def run(**batch):
        loss = model(**batch).loss
        loss.backward()
        return loss

    step = GraphedStep(run, patch.trainable.values()) if graphed else lambda batch: run(**batch)
    optimizer = torch.optim.AdamW(patch.trainable.values(), lr=1e-2)
    found = []
    for i, batch in enumerate(batches()):
        found.append(step(batch).item())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return found, step


def same(*options, **more):
    got, step = losses(True, *options, **more)
    torch.testing.assert_close(got, losses(False, *options, **more)[0])
    return step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_same_losses(fake, set_to_none, accumulate):
    step = same(set_to_none, accumulate)
    assert step.reason is None and len(fake) == 2  # one graph a shape


def product(size, **options):
    """Ones [size] that train, and a step whose loss is ``times`` the sum of them times ``a``."""
    x = torch.ones(size, requires_grad=True, device=DEVICE)

    def run(a, times=1):
        loss = (x * a).sum() * times
        loss.backward()
        return loss

    return x, GraphedStep(run, [x], **options)


def test_gradients_that_someone_else_put_there_are_added_to(fake):
    x, step = product(3)
    a = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    step(dict(a=a))
    x.grad = torch.full((3,), 10.0, device=DEVICE)
    step(dict(a=a))
    assert x.grad.tolist() == [11, 12, 13]


def test_a_loss_is_not_overwritten_by_the_next(fake):
    _, step = product(1)
    first, second = (step(dict(a=torch.tensor([v], device=DEVICE))) for v in (2.0, 5.0))
    assert (first.item(), second.item()) == (2, 5)


def test_random_numbers_are_those_without_a_graph(fake):
    x = torch.ones(4, requires_grad=True)

    def run(a):
        loss = (x * torch.rand(4) * a).sum()
        loss.backward()
        return loss

    a = torch.ones(4)
    torch.manual_seed(5)
    want = run(a)
    torch.manual_seed(5)
    assert torch.equal(GraphedStep(run, [x])(dict(a=a)), want)


def test_more_shapes_than_are_kept_run_as_they_are(fake):
    _, step = product(1, most=1)
    step(dict(a=torch.ones(2)))
    assert step.reason is None
    assert step(dict(a=torch.ones(3))).item() == 3
    assert step.reason == "more than 1 shapes of batch"
    step(dict(a=torch.ones(2)))
    assert step.reason is None and len(fake) == 1


def test_other_values_are_another_graph(fake):
    _, step = product(1)
    assert [step(dict(a=torch.ones(1), times=n)).item() for n in (1, 2, 1)] == [1, 2, 1]
    assert len(fake) == 2


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a card")
def test_without_a_card_it_is_the_step_itself():
    step = same()
    assert step.reason == "a batch that is not on a CUDA device"
    _, step = product(1)
    assert not step(dict(a=torch.ones(1))).requires_grad  # as that of a graph


def test_a_parameter_that_is_not_reached_gets_no_gradient(fake):
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))

    def run(a, both=False):
        loss = (x * a).sum() + (y * a).sum() * both if both else (x * a).sum()
        loss.backward()
        return loss

    step = GraphedStep(run, [x, y])
    a = torch.tensor([1.0, 2.0])
    step(dict(a=a))
    step(dict(a=a))
    assert y.grad is None and x.grad.tolist() == [2, 4]
    step(dict(a=a, both=True))
    step(dict(a=a))
    assert y.grad.tolist() == [1, 2] and x.grad.tolist() == [4, 8]


def test_a_warm_up_that_fails_leaves_nothing(fake):
    x, runs = torch.ones(1, requires_grad=True), []

    def run(a):
        runs.append((x * torch.rand(1) * a).sum().backward())
        if len(runs) == 2:
            raise torch.OutOfMemoryError("no more")
        return a.sum()

    x.grad = torch.full((1,), 7.0)
    state = torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        GraphedStep(run, [x])(dict(a=torch.ones(1)))
    assert x.grad.item() == 7 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_card_the_losses_are_those_of_an_eager_run(accumulate):
    step = same(True, accumulate)
    assert step.reason is None


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.randint(4, 60, (9,), generator=torch.Generator().manual_seed(i))
        return dict(input_ids=ids, labels=ids)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(fake, tmp_path, accumulate):
    found = {}
    for kind in (Trainer, GraphedTrainer):
        model, patch = patched()
        args = TrainingArguments(
            tmp_path / kind.__name__, max_steps=3, per_device_train_batch_size=2,
            learning_rate=1e-2, gradient_accumulation_steps=accumulate, report_to=[],
            use_cpu=DEVICE == "cpu", seed=3, logging_steps=1, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = kind(model, args, train_dataset=Rows())
        trainer.train()
        found[kind] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found[kind] += [p.detach().sum().item() for p in patch.trainable.values()]
    assert trainer.graphs.reason is None
    torch.testing.assert_close(*found.values())
