"""A training step of M2PT on a LLaVA-1.5-7B with random weights in NF4, and of its language model.

M2PT's 20 visual prompts in each layer of the vision tower, 10 textual ones in each layer of the
language model, the projector trained (float32 copy); all else frozen. Labels on the last tokens.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks import llava, training
from benchmarks.llava import Tuning
from benchmarks.registry import Benchmark, NotMeasured, Provider, Step
from benchmarks.training import ALL, BALANCED, HOST, MODES, NONE
from fastprompt.methods import M2PT, DeepPrompts, Method

BITS = 4 + 8 / 64 + 32 / 64 / 256  # of a weight in NF4, double-quantised


class Case(training.Case):
    @property
    def parts(self) -> tuple[str, ...]:
        return ("model.multi_modal_projector",) if self.shape.vision else ()

    @property
    def method(self) -> Method:
        s = self.shape
        return M2PT(s.visual, s.textual) if s.vision else DeepPrompts(text=s.textual)

    def build(self) -> nn.Module:
        return llava.build(self.shape, self.dtype, self.device)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return llava.inputs(self.shape, self.dtype, dtype, self.device)


# ---- others' ways ----


def _liger(case: Case, mode: str) -> Step:
    """ref with liger-kernel's norms, rotation, SwiGLU and fused loss; it changes classes for good,
    which a process of its own survives."""
    if find_spec("liger_kernel") is None:
        raise NotMeasured("liger-kernel is not installed")
    if case.device == "cpu":
        raise NotMeasured("liger-kernel's operations need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_llava

    model = case.model()
    apply = apply_liger_kernel_to_llava if case.shape.vision else apply_liger_kernel_to_llama
    apply(model=model)
    context = training.checkpointing(model, mode)
    return training.step_of(case, model, training.literal(case, model), context)


def _peft(case: Case, mode: str) -> Step:
    """Prefix tuning of the language model: keys and values that train, no visual prompts, no
    projector."""
    if find_spec("peft") is None:
        raise NotMeasured("peft is not installed")
    if mode != NONE:
        raise NotMeasured("PEFT's prefix tuning refuses gradient checkpointing")
    from peft import PrefixTuningConfig, get_peft_model

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.shape.textual)
    model = get_peft_model(case.model(), prefix)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return training.step_of(case, model.train(), trained)


# ---- fp8 ----


def _fp8(case: Case, mode: str) -> Step:
    if case.device == "cpu":
        raise NotMeasured("the CPU only emulates fp8")
    if torch.cuda.get_device_capability() < (8, 9):
        raise NotMeasured("this card has no fp8: its capability is below 8.9")
    model = case.model()
    return training.step_of(case, model, training.patched(case, model, mode, compute="fp8"))


# ---- what cannot be avoided ----


def cost(s: Tuning, mode: str, itemsize: int) -> tuple[int, int]:
    """(bytes of decoding, FLOPs of the products); no attention, no elementwise work.

    Every 4-bit weight is read and written decoded once in forward and once in backward (where
    recomputation may share it); each product runs forward, back to its input unless nothing wants
    that, and again as the mode says; the head on labelled rows alone.
    """
    weights, flops = 0, 0
    t = s.text
    keys = t.kv * t.width // t.heads
    begin = t.width * (t.width + 2 * keys)  # q, k, v
    elements = begin + t.width**2 + 3 * t.width * t.inner
    again = _again(mode, elements, 2 * t.width * t.inner, t.width * t.inner)
    flops += s.tokens * (t.layers * (2 * elements + again) - begin * (s.vision is None))
    weights += t.layers * elements
    flops += 2 * s.B * s.answer * t.width * t.vocab
    if s.vision:
        v = s.vision
        layers = v.layers - 1  # nothing reads the last
        elements = 4 * v.width**2 + 2 * v.width * v.inner
        again = _again(mode, elements, v.width * v.inner, v.width * v.inner)
        tokens = s.B * (v.patches + 1)
        flops += tokens * (layers * (2 * elements + again) - 3 * v.width**2)
        weights += layers * elements
        # the projector trains: its weights' gradients too
        flops += 3 * s.B * v.patches * (v.width * t.width + t.width**2)
    return int(2 * weights * (BITS / 8 + itemsize)), 2 * flops


def _again(mode: str, elements: int, begin_mlp: int, end_mlp: int) -> int:
    """Weights of one layer whose product runs a second time."""
    if mode == BALANCED:
        return begin_mlp
    return elements - end_mlp if mode in (ALL, HOST) else 0


BENCHMARK = Benchmark(
    name="m2pt_step",
    about="a training step of M2PT in NF4: forward, backward, AdamW on prompts and projector",
    modes=MODES,
    dtypes=dict(cuda=("bf16",), cpu=("fp32", "bf16")),
    baseline="ref",
    shapes=llava.shapes,
    case=Case,
    judge=training.judge,
    cost=cost,
    in_turn=True,
    truth=training.truth,
    providers={
        **training.PROVIDERS,
        "fastprompt-fp8": Provider(
            _fp8,
            'fastprompt.patch(compute="fp8")',
            ours=True,
            exempt="coarser by design: benchmarks/fp8_error.py says how much",
        ),
        "ref-liger": Provider(_liger, "ref with liger-kernel's operations and fused loss"),
        "peft-prefix": Provider(
            _peft, "PEFT's prefix tuning of the language model", exempt="other work: no prompt rows"
        ),
    },
)
