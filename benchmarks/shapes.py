"""Shapes of real models, by name: their heads, tokens and prompts, and a batch that fits a device.

On the CPU the same models run with smaller batches, and a small language model stands for the large
ones: a row always says its whole shape, so that nobody takes one for the other.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    B: int
    H: int  # query heads
    Hkv: int  # key and value heads
    N: int  # tokens
    d: int
    P: int  # prompts
    causal: bool = False

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.Hkv == self.H else f"H{self.H}/{self.Hkv}"
        size = f"B{self.B} {heads} N{self.N} d{self.d} P{self.P}"
        return size + " causal" * self.causal


_GPU = {
    "ViT-B/16": Attention(B=128, H=12, Hkv=12, N=197, d=64, P=50),
    "CLIP-L/336": Attention(B=32, H=16, Hkv=16, N=577, d=64, P=20),
    "LLaMA-7B": Attention(B=8, H=32, Hkv=32, N=1024, d=128, P=10, causal=True),
    "Llama-8B": Attention(B=4, H=32, Hkv=8, N=2048, d=128, P=20, causal=True),
}
_CPU = {
    "ViT-B/16": Attention(B=8, H=12, Hkv=12, N=197, d=64, P=50),
    "CLIP-L/336": Attention(B=1, H=16, Hkv=16, N=577, d=64, P=20),
    "SmolLM2-135M": Attention(B=8, H=9, Hkv=3, N=256, d=64, P=10, causal=True),
}
_QUICK = {
    "ViT-B/16": Attention(B=2, H=12, Hkv=12, N=197, d=64, P=50),
    "SmolLM2-135M": Attention(B=2, H=9, Hkv=3, N=64, d=64, P=10, causal=True),
}


def attention(device: str, quick: bool) -> dict[str, Attention]:
    if quick:
        return _QUICK
    return _GPU if device == "cuda" else _CPU
