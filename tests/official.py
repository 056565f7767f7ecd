"""M2PT as its released code computes it, in plain PyTorch: CLIP, projector, LLaMA, rows written.

Written from the description of the paper (arXiv 2409.15657) and of the released code
(github.com/William-wAng618/M2PT): in both towers P rows are put in front once and overwritten by
the layer's own prompt before every layer; the vision encoder's rows come after its pre-norm and
before the class token, the language model's before BOS, where they take positions 0 .. P-1; a
state is recorded after its layer's rows were written, and the projector gets
``hidden_states[-2][:, 1:]``; labels of prompt rows are -100. Nothing of transformers or fastprompt
computes here: only a model's weights, by name, and the numbers of its config, are taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

VISION, PROJECTOR, TEXT = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
)


class Official:
    """A CLIP + LLaMA LLaVA with one prompt [1, P, D] for every layer of both towers."""

    def __init__(self, model, vision_prompts: list[Tensor], text_prompts: list[Tensor]):
        self.w = dict(model.named_parameters())
        self.vision, self.text = model.config.vision_config, model.config.text_config
        self.image = model.config.image_token_index
        self.vision_prompts, self.text_prompts = vision_prompts, text_prompts

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.vision.layer_norm_eps)

    def rms_norm(self, x, name):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.text.rms_norm_eps)
        return x * scale * self.w[f"{name}.weight"]

    # ---- vision ----

    def clip(self, pixels: Tensor) -> list[Tensor]:
        """The recorded states of the encoder, each with its prompt rows in front."""
        at, B = f"{VISION}.embeddings", len(pixels)
        patches = F.conv2d(
            pixels, self.w[f"{at}.patch_embedding.weight"], stride=self.vision.patch_size
        )
        x = torch.cat(
            [self.w[f"{at}.class_embedding"].expand(B, 1, -1), patches.flatten(2).mT], dim=1
        )
        x = self.norm(x + self.w[f"{at}.position_embedding.weight"], f"{VISION}.pre_layrnorm")
        x = torch.cat([self.vision_prompts[0].repeat(B, 1, 1), x], dim=1)
        states = []
        for i, prompt in enumerate(self.vision_prompts):
            x = x.clone()
            x[:, : prompt.shape[1]] = prompt.repeat(B, 1, 1)
            states.append(x)
            at = f"{VISION}.encoder.layers.{i}"
            x = x + self.clip_attention(self.norm(x, f"{at}.layer_norm1"), f"{at}.self_attn")
            h = self.linear(self.norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), f"{at}.mlp.fc2")
        return [*states, x]

    def clip_attention(self, x, at):
        q, k, v = (
            self.heads(self.linear(x, f"{at}.{n}_proj"), self.vision.num_attention_heads)
            for n in "qkv"
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.out_proj")

    @staticmethod
    def heads(x, count):
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def images(self, pixels: Tensor, shown: str = "raw") -> Tensor:
        """What the language model sees of each image."""
        states, P = self.clip(pixels), self.vision_prompts[0].shape[1]
        if shown == "raw":
            x = states[-2][:, 1:]
        else:  # the paper's drawing: the tapped layer's own outputs, before they are overwritten
            i = len(states) - 3
            at, x = f"{VISION}.encoder.layers.{i}", states[i]
            x = x + self.clip_attention(self.norm(x, f"{at}.layer_norm1"), f"{at}.self_attn")
            h = self.linear(self.norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), f"{at}.mlp.fc2")
            patches = x[:, P + 1 :]
            x = patches if shown == "drop" else torch.cat([x[:, :P], patches], dim=1)
        if f"{PROJECTOR}.weight" in self.w:
            return self.linear(x, PROJECTOR)
        return self.linear(F.gelu(self.linear(x, f"{PROJECTOR}.linear_1")), f"{PROJECTOR}.linear_2")

    # ---- language ----

    def llama(self, x: Tensor, seen: Tensor) -> Tensor:
        """Logits [B, P + T, V] of embeddings [B, T, D]; seen [B, T] bool."""
        B, P = len(x), self.text_prompts[0].shape[1]
        x = torch.cat([self.text_prompts[0].repeat(B, 1, 1), x], dim=1)
        # after the first token's entry, as the released code has it
        seen = torch.cat([seen[:, :1], seen.new_ones(B, P), seen[:, 1:]], dim=1)
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).tril() & seen[:, None, None, :]
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        d = self.text.head_dim
        theta = self.text.rope_parameters["rope_theta"]
        # LLaMA's frequencies are float32 numbers, whatever computes with them
        frequencies = 1 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        angles = torch.arange(T, dtype=x.dtype)[:, None] * frequencies.to(x.dtype)
        cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))

        def rotate(y):
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        for i, prompt in enumerate(self.text_prompts):
            x = x.clone()
            x[:, :P] = prompt.repeat(B, 1, 1)
            at = f"{TEXT}.layers.{i}"
            h = self.rms_norm(x, f"{at}.input_layernorm")
            q, k, v = (
                self.heads(self.linear(h, f"{at}.self_attn.{n}_proj"), count)
                for n, count in zip(
                    "qkv",
                    [self.text.num_attention_heads, *[self.text.num_key_value_heads] * 2],
                    strict=True,
                )
            )
            q, k = rotate(q), rotate(k)
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
            weights = (q @ k.mT / d**0.5 + mask).softmax(-1)
            x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
            h = self.rms_norm(x, f"{at}.post_attention_layernorm")
            gate, up = (self.linear(h, f"{at}.mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, f"{at}.mlp.down_proj")
        return self.linear(self.rms_norm(x, f"{TEXT}.norm"), "lm_head")

    # ---- whole ----

    def __call__(self, ids, pixels, seen, labels=None, shown="raw"):
        """Logits of the tokens [B, T, V], and the loss; ids hold every image token there is."""
        x = self.w[f"{TEXT}.embed_tokens.weight"][ids]
        image = (ids == self.image)[..., None]
        x = x.masked_scatter(image, self.images(pixels, shown))
        logits, P = self.llama(x, seen.bool()), self.text_prompts[0].shape[1]
        if labels is None:
            return logits[:, P:], None
        labels = torch.cat([labels.new_full((len(labels), P), -100), labels], dim=1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return logits[:, P:], loss
