"""A training step in a CUDA graph: where batches are small, launching kernels takes longer than
running them, and a graph launches all of them at once.

    step = GraphedStep(lambda **batch: run(model, batch), patch.trainable.values())
    for batch in data:
        loss = step(batch)
        optimizer.step()
        optimizer.zero_grad()

with ``run`` a forward and a backward that returns the loss. `GraphedTrainer` is transformers'
Trainer with its step captured so. Every shape of batch is captured once; what cannot be captured
runs as it is, and ``reason`` says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

WARM_UPS = 3  # kernels are compiled, libraries take their workspaces
MOST = 8  # shapes of batch: each graph holds the memory of its step


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]  # tensors at the addresses that the graph reads
    loss: Tensor
    reached: list[nn.Parameter]  # those that get gradients


class GraphedStep:
    """``run(**batch)`` captured in a CUDA graph for each shape of batch, and replayed.

    Args:
        run: computes a loss, calls its backward, returns it. It must read nothing of its tensors'
            values on the host. Gradients are added to what ``parameters`` have, as ever.
        parameters: all that get gradients.
        most: of this many shapes a graph is kept; other shapes run as they are.

    Attributes:
        reason: why the last step was not a graph's; None: it was.
    """

    def __init__(
        self, run: Callable[..., Tensor], parameters: Iterable[nn.Parameter], *, most: int = MOST
    ):
        self.run, self.parameters, self.most = run, list(parameters), most
        self.reason: str | None = None
        self._captured: dict[Hashable, _Captured] = {}
        self._grads: dict[nn.Parameter, Tensor] = {}

    def __call__(self, batch: dict[str, Any], key: Hashable = ()) -> Tensor:
        """The loss of the batch, detached; its gradients are added to the parameters'.

        Args:
            batch: tensors on one CUDA device, and values that can be hashed.
            key: whatever else ``run`` depends on: another key is another graph.
        """
        tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
        shapes = tuple((name, x.shape, x.dtype, x.device) for name, x in sorted(tensors.items()))
        rest = tuple(sorted((name, x) for name, x in batch.items() if name not in tensors))
        key = (shapes, rest, key)
        self.reason = self._why_not(tensors, key)
        if self.reason is not None:
            return self.run(**batch).detach()
        if key not in self._captured:
            self._captured[key] = self._capture(batch, tensors)
        graph, inputs, loss, reached = self._captured[key]
        self._hold_gradients(reached)
        for name, x in tensors.items():
            inputs[name].copy_(x, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _why_not(self, tensors: dict[str, Tensor], key: Hashable) -> str | None:
        if not _on_a_card(tensors.values()):
            return "a batch that is not on a CUDA device"
        if key not in self._captured and len(self._captured) >= self.most:
            return f"more than {self.most} shapes of batch"
        return None

    def _hold_gradients(self, reached: list[nn.Parameter]) -> None:
        """The graph adds to the gradients where they lay when it was captured.

        Parameters that ``run`` does not reach keep what they have: an optimizer skips those with
        no gradient, and would decay those with a gradient of zeros.
        """
        for p in reached:
            held = self._grads[p]
            if p.grad is None:  # zero_grad() takes them away
                p.grad = held.zero_()
            elif p.grad is not held:
                p.grad = held.copy_(p.grad)

    def _capture(self, batch: dict[str, Any], tensors: dict[str, Tensor]) -> _Captured:
        device = next(iter(tensors.values())).device
        inputs = {name: x.clone() if name in tensors else x for name, x in batch.items()}
        with _nothing_happened(device, self.parameters), _no_checks_on_the_host():
            for p in self.parameters:
                p.grad = None  # to see which get one
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.run(**inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            reached = [p for p in self.parameters if p.grad is not None]
            for p in reached:
                p.grad = self._grads.setdefault(p, torch.zeros_like(p))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self.run(**inputs).detach()
        return _Captured(graph, inputs, loss, reached)


def _on_a_card(tensors: Iterable[Tensor]) -> bool:
    return {x.device.type for x in tensors} == {"cuda"}


@contextmanager
def _nothing_happened(device: torch.device, parameters: list[nn.Parameter]):
    """Gradients and random numbers afterwards are those of before, even if something is raised."""
    before, state = [p.grad for p in parameters], torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        torch.cuda.set_rng_state(state, device)


@contextmanager
def _no_checks_on_the_host():
    """transformers compares the number of image tokens with that of features on the host."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class GraphedTrainer(Trainer):
    """transformers' Trainer with each step's forward and backward in a CUDA graph.

    For batches of few shapes (``group_by_length``, padding to a multiple). On the CPU it is
    Trainer itself.
    """

    graphs: GraphedStep | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if self.graphs is None:
            step = super().training_step

            def run(num_items_in_batch: Tensor | int | None, **inputs: Any) -> Tensor:
                return step(model, inputs, num_items_in_batch)

            trained = [p for p in model.parameters() if p.requires_grad]
            self.graphs = GraphedStep(run, trained)
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:  # a number would be a graph of its own each time
            num_items_in_batch = torch.as_tensor(num_items_in_batch, device=self.args.device)
        steps = getattr(self, "current_gradient_accumulation_steps", 1)
        return self.graphs({**inputs, "num_items_in_batch": num_items_in_batch}, key=steps)
