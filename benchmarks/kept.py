"""What one block keeps for backward, in KB a token: README's table, counted.

    python -m benchmarks.kept

transformers' own layers at their real widths, frozen, in bfloat16 with SDPA on the CPU: the
storages that autograd saves, each once, at two lengths; without weights, and without the rotary
angles that all layers share. Ours: what the policies say (`tests/test_blocks_memory.py` counts that
they keep just this).
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from fastprompt import families
from fastprompt.blocks.memory import POLICIES, kept_bytes

BF16 = torch.bfloat16
ONE = dict(num_hidden_layers=1, attn_implementation="sdpa")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama 7B": lambda: tf.LlamaModel(tf.LlamaConfig(vocab_size=8, **ONE)),
    "Llama 3 8B": lambda: tf.LlamaModel(
        tf.LlamaConfig(vocab_size=8, num_key_value_heads=8, intermediate_size=14336, **ONE)
    ),
    "CLIP ViT-L": lambda: tf.CLIPVisionModel(
        tf.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_attention_heads=16, patch_size=14, **ONE
        )
    ),
    "ViT-B": lambda: tf.ViTModel(tf.ViTConfig(**ONE)),
}


def saved_bytes(run: Callable[[], Any], shared: Sequence[Tensor] = ()) -> int:
    """Bytes of the storages that ``run`` saves for backward, but for those that are ``shared``."""
    left_out = {t.untyped_storage().data_ptr() for t in shared}
    found: dict[int, int] = {}
    held = []  # alive, so that no address is taken twice

    def pack(x: Tensor) -> Tensor:
        held.append(x)
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held.append(run())
    return sum(found.values())


def row(name: str) -> dict[str, float]:
    """KB (1024 bytes) a token and block: "own", and by policy."""
    with torch.device("meta"):
        model = MODELS[name]().to(BF16)
    block = families.anatomy(model).towers[0].blocks[0]
    # of what the weights are nothing depends here
    layer = block.layer.to_empty(device="cpu").requires_grad_(False).train()

    def at(length: int) -> int:
        x = torch.zeros(1, length, block.parts.down.out_features, dtype=BF16, requires_grad=True)
        angles = list(torch.zeros(2, 1, length, block.parts.head_dim, dtype=BF16))
        given = dict(position_embeddings=angles) if block.parts.rotary else {}
        return saved_bytes(lambda: layer(x, None, **given), [*layer.parameters(), *angles])

    counted = {"own": (at(96) - at(32)) / 64}
    counted |= {policy: kept_bytes(block.parts, policy, BF16, BF16) for policy in POLICIES}
    return {key: n / 1024 for key, n in counted.items()}


def main() -> int:
    columns = ("own", *POLICIES)
    print(f"KB a token and block, bfloat16   torch {torch.__version__}, ", end="")
    print(f"transformers {tf.__version__}\n{'':<12}" + "".join(f"{c:>10}" for c in columns))
    for name in MODELS:
        found = row(name)
        print(f"{name:<12}" + "".join(f"{found[c]:>10.1f}" for c in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
