"""PEFT's prefix, prompt and P-tuning checkpoints give PEFT's own logits here, and ours give ours
there; VPT's released files."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
import zoo
from safetensors.torch import save_file
from test_exactness import relative

import fastprompt
from fastprompt.importers import load_peft, load_vpt, save_peft
from fastprompt.methods import VPT, DeepPrompts, PrefixTuning
from fastprompt.rotation import rotate, unrotate

P = 4
MODELS = ["llama", "qwen3", "gpt2", "opt", "phi3"]


def build(name, dtype=torch.float64):
    if name == "phi3":  # without the window that zoo's has
        torch.manual_seed(0)
        model = tf.Phi3ForCausalLM(tf.Phi3Config(**tiny.TEXT, resid_pdrop=0.0))
    else:
        model = tiny.build(name) if name in tiny.TEXT_CONFIGS else zoo.build(name)
    return model.to(dtype).eval()


def batch(pad=0):
    torch.manual_seed(1)
    ids = torch.randint(6, 60, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.fixture
def wide(monkeypatch):
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def test_unrotate_is_the_inverse_of_rotate():
    rotary = build("llama").model.rotary_emb.double()
    rotary.attention_scaling = 1.3  # as YaRN's
    k = torch.randn(2, 5, 8, dtype=torch.float64)
    assert relative(rotate(unrotate(k, rotary, 3), rotary, 3), k) < 1e-12
    assert relative(unrotate(k, rotary, 3), k) > 0.1


def peft_model(name, config):
    peft = pytest.importorskip("peft")
    model = build(name)
    made = peft.get_peft_model(model, getattr(peft, config)(**_OPTIONS[config]))
    for p in made.prompt_encoder.parameters():
        torch.nn.init.normal_(p)
    return made.double().eval()


_OPTIONS = {
    "PrefixTuningConfig": dict(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "PromptTuningConfig": dict(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "PromptEncoderConfig": dict(
        task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("config", _OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_pefts_checkpoint_gives_pefts_logits(name, config, tmp_path, wide):
    """Under learned positions padded on the left, too (PEFT's rotary ones would count that)."""
    if name == "qwen3" and config == "PrefixTuningConfig":
        pytest.skip("PEFT 0.21 takes the head's width for hidden_size / heads, which it is not")
    theirs = peft_model(name, config)
    theirs.save_pretrained(tmp_path)
    ours = build(name)
    base = ours(**batch()).logits
    patch = load_peft(ours, tmp_path)
    for pad in (0, 2) if name in ("gpt2", "opt") else (0,):
        given = batch(pad)
        seen = given["attention_mask"].bool()
        want = theirs(**given).logits[:, -7:]  # prompt tuning's have the prompts' own in front
        got = ours(**given).logits
        assert relative(base, want) > 1e-3
        assert relative(got[seen], want[seen]) < 1e-6  # PEFT keeps float32
    patch.undo()
    assert torch.equal(ours(**batch()).logits, base)


@pytest.mark.parametrize("name", ["llava", "llava dinov2 qwen3"])
def test_a_prefix_of_a_vision_language_model(name, tmp_path):
    """PEFT's of the whole model, there and back."""
    peft = pytest.importorskip("peft")
    given, config = tiny.inputs(name), peft.PrefixTuningConfig(**_OPTIONS["PrefixTuningConfig"])
    theirs = peft.get_peft_model(tiny.build(name), config).eval()
    for p in theirs.prompt_encoder.parameters():
        torch.nn.init.normal_(p)
    want = theirs(**given).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny.build(name)
    base = ours(**given).logits
    load_peft(ours, tmp_path / "theirs")
    assert relative(ours(**given).logits, want) < 1e-5 and relative(base, want) > 0.1
    save_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "ours").eval()
    assert relative(back(**given).logits, want) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [DeepPrompts(text=P), PrefixTuning(P)])
def test_our_prompts_give_our_logits_in_peft(name, method, tmp_path):
    peft = pytest.importorskip("peft")
    model = build(name, torch.float32)
    base = copy.deepcopy(model)
    learned = name in ("gpt2", "opt")
    if learned and isinstance(method, PrefixTuning):
        method = PrefixTuning(P, position_offset=P)
    patch = fastprompt.patch(model, method)
    for p in patch.trainable.values():
        torch.nn.init.normal_(p)
    if learned and not isinstance(method, PrefixTuning):
        with pytest.raises(ValueError, match="count on from 4 under learned positions, these from"):
            save_peft(model, tmp_path)
        assert not any(tmp_path.iterdir())
        return
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    want, got = model(**batch()).logits, theirs(**batch()).logits
    assert relative(got, want) < 1e-4
    again = load_peft(build(name, torch.float32), tmp_path).model
    assert relative(again(**batch()).logits, model(**batch()).logits) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_positions_that_begin_elsewhere(name, tmp_path, wide):
    """As if P tokens stood in front: with a cache, padding on the left, given positions."""
    model = build(name)
    base = copy.deepcopy(model)
    patch = fastprompt.patch(model, PrefixTuning(P, position_offset=P))
    for p in patch.trainable.values():
        torch.nn.init.normal_(p)
    given = batch(pad=2)
    whole = model(**given).logits
    begun = {key: value[:, :5] for key, value in given.items()}
    first = model(**begun,
                  use_cache=True)  # fmt: skip
    rest = model(input_ids=given["input_ids"][:, 5:], attention_mask=given["attention_mask"],
                 past_key_values=first.past_key_values)  # fmt: skip
    assert relative(rest.logits, whole[:, 5:]) < 1e-10
    positions = given["attention_mask"].cumsum(-1) * given["attention_mask"] - 1
    columns = torch.arange(7).expand(2, 7)
    named = model(**given, position_ids=columns if name == "gpt2" else positions).logits
    assert relative(named, whole) < 1e-10
    text = model.generate(**given, max_new_tokens=3, do_sample=False)  # which counts tokens itself
    counted = model(**given, position_ids=positions).logits
    assert torch.equal(text[:, 7], counted[:, -1].argmax(-1))
    bare = base(**given).logits
    with patch.disabled():
        assert torch.equal(model(**given).logits, bare)
    with patch.using(None):
        assert relative(model(**given).logits, bare) < 1e-10
    with patch.using([None, "default"]):
        rows = model(**given).logits
    assert relative(rows, torch.stack([bare[0], whole[1]])) < 1e-10
    fastprompt.save(model, tmp_path)
    fresh = build(name)
    assert fastprompt.load(fresh, tmp_path).method.position_offset == P
    assert relative(fresh(**given).logits, whole) < 1e-10
    patch.undo()
    assert relative(model(**given).logits, whole) > 1e-3


def test_a_window_that_hides_pefts_prompts_is_warned_of(tmp_path):
    model = zoo.build("phi3")
    width = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 8
    with pytest.warns(UserWarning, match="sliding windows hide PEFT's prompts"):
        load_peft(model, written(tmp_path, shape=(P, width)))


def test_an_offset_is_for_learned_positions():
    with pytest.raises(ValueError, match="position_offset: want 0, or more under learned"):
        fastprompt.patch(build("llama"), PrefixTuning(P, position_offset=P))
    for offset in (-1, True, 2.0):
        with pytest.raises(ValueError, match="position_offset: want a whole number 0 or more, got"):
            fastprompt.patch(build("gpt2"), PrefixTuning(P, position_offset=offset))


def written(folder, kind="PREFIX_TUNING", name="prompt_embeddings", shape=(P, 3 * 2 * 2 * 8)):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type=kind)))
    save_file({name: torch.zeros(shape)}, folder / "adapter_model.safetensors")
    return folder


def test_what_peft_files_cannot_be(tmp_path):
    model = build("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for match, path in (
        ("adapter_config.json; FileNotFound", tmp_path / "none"),
        (
            "want PREFIX_TUNING, PROMPT_TUNING or P_TUNING; got LORA",
            written(tmp_path / "a", "LORA"),
        ),
        ("want prompt_embeddings in it, got lora", written(tmp_path / "b", name="lora")),
        (r"want prompt_embeddings \[P, \d+\], got \[4, 7\]", written(tmp_path / "c", shape=(P, 7))),
        (r"\[P, 32\], got \[4, 7\]", written(tmp_path / "d", "PROMPT_TUNING", shape=(P, 7))),
    ):
        with pytest.raises(ValueError, match=match):
            load_peft(model, path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="want a causal language model, got t5"):
        load_peft(zoo.build("t5"), written(tmp_path / "e"))
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    with pytest.raises(ValueError, match="load_peft: want rotation that no length changes"):
        load_peft(tiny.build("llama", rope_parameters=rope), written(tmp_path / "e"))
    fastprompt.patch(model)
    with pytest.raises(ValueError, match="not patched"):
        load_peft(model, tmp_path / "c")


# ---- VPT's released code ----


def vit():
    return tiny.build("vit").eval()


def rows(layers, width=None):
    width = vit().config.hidden_size if width is None else width
    return np.random.default_rng(0).standard_normal((layers, P, width)).astype(np.float32)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["the whole model's", "prompts alone"])
def test_released_vpt_prompts(deep, whole, tmp_path):
    model, given = vit(), tiny.inputs("vit")
    shallow, others = rows(1), rows(len(model.vit.layers) - 1)[::-1].copy()
    if whole:  # narrow rows and a projection
        weight, bias = torch.randn(shallow.shape[-1], 6), torch.randn(shallow.shape[-1])
        narrow = [torch.from_numpy(rows(n, 6)) for n in (1, len(others))]
        shallow, others = ((x @ weight.T + bias).numpy() for x in narrow)
        names = ("prompt_embeddings", "deep_prompt_embeddings")
        state = {f"enc.transformer.{n}": x for n, x in zip(names[: 1 + deep], narrow, strict=False)}
        state |= {"enc.transformer.prompt_proj.weight": weight, "head.last_layer.bias": bias}
        state["enc.transformer.prompt_proj.bias"] = bias
        torch.save(dict(model=state, iteration=3) if deep else state, tmp_path / "p.pth")
    else:
        found = dict(shallow_prompt=shallow) | (dict(deep_prompt=others) if deep else {})
        torch.save(found, tmp_path / "p.pth")
    patch = load_vpt(model, tmp_path / "p.pth")
    assert patch.method == VPT(P, deep=deep)
    other = vit()
    by_hand = fastprompt.patch(other, VPT(P, deep=deep))
    for prompt, value in zip(by_hand.prompts.values(), [*shallow, *(others if deep else ())],
                             strict=True):  # fmt: skip
        prompt.tokens.data.copy_(torch.from_numpy(value))
    by_hand.refresh()
    assert relative(model(**given).logits, other(**given).logits) < 1e-6
    assert relative(model(**given).logits, vit()(**given).logits) > 1e-3


def test_vpts_files_are_of_numpy_1(tmp_path):
    path = tmp_path / "p.pth"
    torch.save(dict(shallow_prompt=rows(1)), path, _use_new_zipfile_serialization=False)
    named = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"cnumpy.core.multiarray" in named
    path.write_bytes(named)
    prompt = next(iter(load_vpt(vit(), path).prompts.values()))
    assert torch.equal(prompt.tokens, torch.from_numpy(rows(1)[0]))


def test_what_vpt_files_cannot_be(tmp_path):
    path, model = tmp_path / "p.pth", vit()
    for match, found in (
        (r"want rows of width \d+, got \[1, 4, 6\] .*projection", dict(shallow_prompt=rows(1, 6))),
        ("want prompts of 1 block or of .*, got 2", dict(shallow_prompt=rows(1),
                                                         deep_prompt=rows(1))),
        ("want prompts of VPT's released code", dict(other=rows(1))),
    ):  # fmt: skip
        torch.save(found, path)
        with pytest.raises(ValueError, match=match):
            load_vpt(model, path)
        assert not hasattr(model, "_fastprompt_patch")
    torch.save(dict(shallow_prompt=rows(1)), path)
    with pytest.raises(ValueError, match="want a vision model, got"):
        load_vpt(build("llama"), path)
