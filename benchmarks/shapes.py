"""Shapes of real models, by name: their heads, tokens and prompts, and a batch that fits a device.

On the CPU the same models run with smaller batches, and a small language model stands for the large
ones: a row always says its whole shape, so that nobody takes one for the other.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Attention:
    B: int
    H: int  # query heads
    Hkv: int  # key and value heads
    N: int  # tokens
    d: int
    P: int  # prompts
    causal: bool = False
    cache: int = 0  # keys before the tokens' own

    @property
    def M(self) -> int:
        """Keys, prompts apart."""
        return self.cache + self.N

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.Hkv == self.H else f"H{self.H}/{self.Hkv}"
        size = f"B{self.B} {heads} N{self.N} d{self.d} P{self.P}"
        return size + " causal" * self.causal + f" M{self.M}" * bool(self.cache)


_GPU = {
    "ViT-B/16": Attention(B=128, H=12, Hkv=12, N=197, d=64, P=50),
    "CLIP-L/336": Attention(B=32, H=16, Hkv=16, N=577, d=64, P=20),
    "LLaMA-7B": Attention(B=8, H=32, Hkv=32, N=1024, d=128, P=10, causal=True),
    "Llama-8B": Attention(B=4, H=32, Hkv=8, N=2048, d=128, P=20, causal=True),
}
_PROMPTS = (1, 10, 50, 200)  # each model with its own number of prompts, and with these
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
    if device == "cpu":
        return _CPU
    more = {f"{m} P{p}": replace(s, P=p) for m, s in _GPU.items() for p in _PROMPTS if p != s.P}
    return _GPU | more


def decoding(device: str, quick: bool) -> dict[str, Attention]:
    """One token a sample against a cache: Llama-8B's heads, or those of a small model."""
    if device == "cpu" or quick:
        sizes = [(1, 1024), (8, 1024)][: 1 if quick else 2]
        one = Attention(B=1, H=9, Hkv=3, N=1, d=64, P=20, causal=True)
        return {f"SmolLM2 B{b} M{m}": replace(one, B=b, cache=m - 1) for b, m in sizes}
    one = Attention(B=1, H=32, Hkv=8, N=1, d=128, P=20, causal=True)
    sizes = [(b, m) for b in (1, 8, 64) for m in (512, 2048, 8192)]
    return {f"Llama-8B B{b} M{m}": replace(one, B=b, cache=m - 1) for b, m in sizes}
