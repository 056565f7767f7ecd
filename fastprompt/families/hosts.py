"""Vision-language models: a served vision tower, a projector, a served language model.

A projector may read one hidden state of the vision tower (or several) that is not its last. Blocks
past the deepest one that is read get no prompt, and are not run inside the model's own forward.
"""

from dataclasses import dataclass

from torch import nn

from fastprompt.families.base import Anatomy, TowerFamily, is_of, join


@dataclass(frozen=True)
class Host:
    """One kind of vision-language model.

    Attributes:
        name: its configs' ``model_type``; ``also``: other such, of the same parts.
        model: the class whose forward runs both towers, alone or as ``model`` of another.
        vision, text, projector: where they are in it; dotted names.
        taps: whether a ``vision_feature_layer`` says which hidden state is read.
        shows: whether its projector reads that state row by row, so that it can see prompts.
        first_position: see `Anatomy`.
    """

    name: str
    model: str
    vision: str = "vision_tower"
    text: str = "language_model"
    projector: str = "multi_modal_projector"
    taps: bool = False
    shows: bool = False
    first_position: int | None = None
    also: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        return self.name, *self.also

    def anatomy(self, model: nn.Module, families: tuple[TowerFamily, ...]) -> Anatomy:
        places = {"": model, "model": getattr(model, "model", None)}
        inner = next(
            (n for n, m in places.items() if is_of(m, "transformers", (self.model,))), None
        )
        if inner is None:
            raise ValueError(
                f"{type(model).__name__}: want a {self.model}, alone or as `model` of another"
            )
        host, towers = model.get_submodule(inner), []
        for part in (self.vision, self.text):
            module, name = host.get_submodule(part), join(inner, part)
            family = next((f for f in families if f.serves(module)), None)
            if family is None:
                raise ValueError(
                    f"{name}: want one of {', '.join(sorted({f.name for f in families}))}; "
                    f"got {type(module).__name__}"
                )
            towers.append(family.tower(name, module))
        if self.taps:
            vision = towers[0]
            read = _blocks_read(host.config.vision_feature_layer, len(vision.blocks))
            vision.blocks, vision.unread = vision.blocks[:read], vision.blocks[read:]
        parts = {"projector": join(inner, self.projector)}
        return Anatomy(self.name, towers, host, parts, self.first_position, self.shows)


_QWEN = dict(vision="visual", projector="visual.merger")
_IDEFICS = dict(vision="vision_model", text="text_model", projector="connector")

HOSTS = (
    Host("llava", "LlavaModel", taps=True, shows=True, also=("llava_linear",)),
    Host("llava_next", "LlavaNextModel", taps=True),
    Host("llava_onevision", "LlavaOnevisionModel", taps=True),
    Host("qwen2_vl", "Qwen2VLModel", **_QWEN),
    Host("qwen2_5_vl", "Qwen2_5_VLModel", **_QWEN),
    Host("qwen3_vl", "Qwen3VLModel", **_QWEN),
    Host("idefics3", "Idefics3Model", **_IDEFICS),
    Host("smolvlm", "SmolVLMModel", **_IDEFICS),
    Host("paligemma", "PaliGemmaModel", first_position=1),
    Host("gemma3", "Gemma3Model", first_position=0),
    Host("internvl", "InternVLModel", taps=True),
    Host("mistral3", "Mistral3Model", taps=True),
)


def _blocks_read(feature_layer: int | list[int], depth: int) -> int:
    """How many blocks come before the deepest hidden state read; state 0 is the embeddings'."""
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"vision_feature_layer: want {-depth - 1} .. {depth} ({depth} blocks), got {layer}"
            )
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
