"""The compiled part's CUDA kernels (csrc/cuda): whether a card can run them, and their launch.

They lie in fastprompt._native as cubins, where nvcc was there when it was built, and are launched
through CUDA's driver. Without them Triton and torch do the same, more slowly for few tokens.
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt import native

OFF = "FASTPROMPT_CUDA=0"  # in the environment


def archs() -> tuple[int, ...]:
    """Compute capabilities that there are cubins for, 80 for 8.0; empty where none were built."""
    module = native.compiled()[0]
    return tuple(map(int, module.CUDA_ARCHS.split())) if module else ()


def why_not(device: torch.device) -> str | None:
    """Why no kernel can be launched on a GPU; None if one can."""
    if os.environ.get("FASTPROMPT_CUDA") == "0":
        return OFF
    module, why = native.compiled()
    if module is None:
        return why
    built = archs()
    if not built:
        return "built without CUDA kernels"
    major, minor = torch.cuda.get_device_capability(device)
    # a cubin runs on cards of its generation that are no older
    if not any(arch // 10 == major and arch % 10 <= minor for arch in built):
        return f"built for sm_{', sm_'.join(map(str, built))}; the card is sm_{major}{minor}"
    return module.cuda_why_not() or None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: str,
    grid: tuple[int, int],
    threads: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    gain: float,
) -> None:
    """Launch a kernel of csrc/cuda/product.h in torch's current stream.

    Args:
        kernel: its name; grid: thread blocks; threads: of each.
        tensors, sizes, gain: the fields of ``CudaProduct``, in its order; the first tensor says
            which device. Nothing is checked.

    Raises:
        RuntimeError: the driver refuses it, or there are no kernels.
    """
    module, why = native.compiled()
    if module is None:
        raise RuntimeError(why)
    device = tensors[0].device
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        module.cuda_launch(kernel, device.index, [*grid, threads], addresses, sizes, gain, stream)
