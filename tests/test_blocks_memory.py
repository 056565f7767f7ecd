"""What frozen blocks keep for backward, counted; and who decides."""

import importlib

import pytest
import tiny
import torch
from frozen import POLICIES, is_fused, kept, pair

import fastprompt
import fastprompt.families
from fastprompt.blocks import memory
from fastprompt.blocks.memory import Memory, kept_bytes
from fastprompt.methods import VPT, DeepPrompts

loss = importlib.import_module("fastprompt.ops.linear_cross_entropy")
NAMES = ["llama", "qwen3", "vit", "dinov2"]


def a_token(name, policy, dtype, autocast=None, kind="dense"):
    """Bytes that one more block keeps for one more token."""
    found = {}
    for depth in (2, 3):
        more = dict(num_hidden_layers=depth)
        model = pair(name, policy, kind, dtype=dtype, exact=False, **more)[0]
        for size in (16, 64):
            if name in tiny.LANGUAGE:
                given, tokens = dict(tiny.inputs(name, length=size), use_cache=False), 2 * size
            else:
                given = dict(pixel_values=torch.randn(2, 3, size, 64, dtype=dtype))
                given["interpolate_pos_encoding"] = True
                tokens = 2 * size  # patches of 8 by 8, and CLS in both
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                found[depth, size] = kept(model, given, name), tokens
    (a, n), (b, m) = (
        (found[3, size][0] - found[2, size][0], found[3, size][1]) for size in (16, 64)
    )
    return (b - a) / (m - n), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_a_token_are_the_documented_sum(name, dtype):
    found = {}
    for policy in ("off", *POLICIES):
        found[policy], model = a_token(name, policy, dtype)
        if policy != "off":
            parts = (
                fastprompt.patch_of(model)
                .memories[fastprompt.patch_of(model).anatomy.towers[0].name]
                .blocks[0]
            )
            # on the CPU the host's memory is the device's
            counted = "low" if policy == "offload" else policy
            assert found[policy] == kept_bytes(parts, counted, dtype, dtype), policy
    assert found["low"] < found["balanced"] < found["speed"] < found["off"]


def test_the_sum_by_hand():
    """DESIGN section 4: 92, 48 and 8 KB a token and block at 7B, in bfloat16."""
    import transformers as tf

    config = tf.LlamaConfig(num_hidden_layers=1, vocab_size=8)  # 7B's layers are its defaults
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    parts = fastprompt.families.anatomy(model).towers[0].blocks[0].parts
    sizes = {p: kept_bytes(parts, p, torch.bfloat16, torch.bfloat16) for p in POLICIES}
    assert sizes["offload"] == 0 and sizes["low"] == 8 * 1024
    assert sizes["balanced"] == 48 * 1024 + 32 * 4
    assert sizes["speed"] == (48 + 43) * 1024 + 32 * 4  # 2 · 11008 · 2 bytes are 43 KB


def test_under_autocast_the_stream_is_wide():
    got, model = a_token("llama", "speed", torch.float32, torch.bfloat16)
    parts = fastprompt.patch_of(model).memories["model"].blocks[0]
    assert got == kept_bytes(parts, "speed", torch.float32, torch.bfloat16)


def test_four_bits_keep_the_same():
    pytest.importorskip("bitsandbytes")
    dense, packed = (
        a_token("llama", "balanced", torch.float32, kind=k)[0] for k in ("dense", "nf4")
    )
    assert dense == packed


# ---- auto ----


def needs(model, policy, tokens):
    blocks = fastprompt.patch_of(model).memories["model"].blocks
    each = [kept_bytes(p, policy, torch.float32, torch.float32) for p in blocks]
    one = kept_bytes(blocks[0], "speed", torch.float32, torch.float32)
    return tokens * (sum(each) + 2 * one + 16 * 64)  # logits of 64 words


def test_auto_takes_the_fastest_that_fits_and_decides_again(monkeypatch):
    model, _ = pair("llama", "auto", dtype=torch.float32, exact=False)
    patch = fastprompt.patch_of(model)
    chosen = patch.memories["model"]
    assert "auto, decided at the first training forward" in patch.report()
    free = {"bytes": 0}
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(1) or free["bytes"])

    def forward(length, batch=2):
        model(**tiny.inputs("llama", batch=batch, length=length), use_cache=False)
        return chosen.chosen

    with torch.no_grad():
        forward(9)
    assert not asked  # nothing is kept there
    free["bytes"] = needs(model, "balanced", 18) / 0.8 + 1
    assert forward(9) == "balanced" and len(asked) == 1
    assert forward(5) == forward(9) == "balanced" and len(asked) == 1
    assert forward(10) == "low" and len(asked) == 2
    free["bytes"] = needs(model, "speed", 40) / 0.8 + 1
    assert forward(9) == "low" and forward(20) == "speed" and forward(10, batch=4) == "speed"
    assert len(asked) == 3
    free["bytes"] = needs(model, "speed", 42) / 0.8 - 1
    assert forward(21) == "balanced"
    free["bytes"] = None
    assert forward(22) == "speed"
    assert "auto: speed (free memory is not known here)" in patch.report()
    free["bytes"] = 2**31
    forward(30)
    one = kept_bytes(chosen.blocks[0], "speed", torch.float32, torch.float32)
    said = f"{3 * 60 * one / 2**20:.1f} MB kept for 60 tokens, 2.00 GB were free"
    assert f"memory  auto: speed ({said})  (model)" in patch.report()


def test_auto_leaves_room_for_no_more_logits_than_there_are(monkeypatch):
    model, _ = pair("llama", "auto", dtype=torch.float32, exact=False)
    chosen = fastprompt.patch_of(model).memories["model"]
    given = dict(tiny.inputs("llama", batch=2, length=9), use_cache=False)
    labelled = dict(given, labels=given["input_ids"])
    # three rows of logits at once (of 64 words, 16 bytes each) in place of 18
    least = needs(model, "speed", 18) - 16 * 64 * (18 - 3)
    monkeypatch.setattr(loss, "CHUNK", 3 * 64)
    free = {}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free["bytes"])

    def forward(model, given, bytes):
        chosen.chosen, free["bytes"] = None, bytes / 0.8
        model(**given)
        return chosen.chosen

    model.train()
    assert forward(model, labelled, least + 1) == "speed"
    assert forward(model, labelled, least - 1) == "balanced"
    model(**given)  # as many tokens, but with logits
    assert chosen.rows == 18 and chosen.chosen == "balanced"
    assert forward(model, given, least + 1) == "balanced"
    assert forward(model, given, needs(model, "speed", 18) + 1) == "speed"
    assert forward(model.eval(), labelled, least + 1) == "balanced"  # evaluation has logits


def test_on_a_gpu_the_last_resort_is_the_host(monkeypatch):
    model, _ = pair("llama", "auto")
    blocks = fastprompt.patch_of(model).memories["model"].blocks
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    x = torch.empty(2, 9, 32, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", property(lambda x: torch.device("cuda")))
    assert Memory("auto", blocks).policy(x, torch.bfloat16) == "offload"


def test_towers_share_what_is_free():
    model, _ = pair("llava", "auto")
    shares = {name: m.share for name, m in fastprompt.patch_of(model).memories.items()}
    assert shares == {"model.vision_tower": 0.4, "model.language_model": 0.8}


def test_free_bytes_is_what_the_system_says():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


# ---- patch(memory=…) ----


def test_choices():
    model = tiny.build("vit")
    with pytest.raises(ValueError, match=r"memory: want one of auto, speed, .*; got 'fast'"):
        fastprompt.patch(model, memory="fast")
    for policy in (*POLICIES, "off"):
        patch = fastprompt.patch(model, VPT(3), memory=policy)
        tiny.output("vit", model.train(), tiny.inputs("vit")).sum().backward()
        report = patch.report()
        if policy == "off":
            assert "blocks  transformers' own (memory='off')" in report and not patch.blocks
        else:
            assert f"memory  {policy}  (vit)" in report and is_fused(model)
            assert "blocks  3 of 3 as one autograd node" in report
        patch.undo()
    patch = fastprompt.patch(model, DeepPrompts(vision=0))
    assert "blocks  transformers' own: no tower has prompts" in patch.report()
