"""`fastprompt.supports`, and that the registry, the tests and the README name the same families."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
import zoo
from torch import nn

import fastprompt
from fastprompt.families import HOSTS, LIBRARIES, REASONS, TOWERS, anatomy, table
from fastprompt.methods import M2PT, VPT, DeepPrompts


def models():
    yield from ((name, row.build) for name, row in zoo.ROWS.items())
    yield from tiny.FAMILIES.items()


def test_a_model_and_its_config_get_the_same_answer_and_every_family_is_tested():
    seen = set()
    for name, build in models():
        outside = name in zoo.ROWS and zoo.ROWS[name].library != "transformers"
        # timm reads numbers off tensors while it builds
        with torch.device("cpu" if outside else "meta"):
            model = build()
        by_model = fastprompt.supports(model)
        by_config = by_model if outside else fastprompt.supports(model.config)
        assert by_model and by_config, name
        if outside or model.config.model_type not in ("clip", "siglip", "siglip2"):
            assert by_model == by_config, name
        taken = anatomy(model)
        seen |= {taken.family, *(tower.family for tower in taken.towers)}
    assert seen == set(fastprompt.supported())
    towers = (*TOWERS, *(family for library in LIBRARIES for family in library.families))
    assert len(fastprompt.supported()) == len({f.name for f in towers}) + len(HOSTS)


def test_answers_of_configs():
    supports = fastprompt.supports
    assert supports(tf.LlamaConfig()).method == DeepPrompts(text=10)
    assert supports(tf.SwinConfig()).method == VPT()
    assert supports(tf.Qwen3VLConfig()).method == M2PT()
    assert supports(tf.CLIPConfig()).method == DeepPrompts(vision=10, text=10)
    assert str(supports(tf.GPT2Config())).startswith("gpt2, by default with DeepPrompts(")
    for config, reason in (
        (tf.BloomConfig(), "bloom is not served: .*ALiBi"),
        (tf.Mamba2Config(), "mamba2 is not served: .*state"),
        (tf.BartConfig(), "bart is not served: .*a second attention"),
        (tf.BertConfig(add_cross_attention=True, is_decoder=True), "bert with cross-attention"),
        (tf.PhiConfig(), "want a transformers model of llava, .*; got model_type 'phi'"),
        (tf.LlavaConfig(text_config=tf.PhiConfig()), "text_config: want .*; got .*'phi'"),
        (tf.LlavaConfig(vision_config=tf.ViTMAEConfig()), "vision_config: want .*'vit_mae'"),
    ):
        answer = supports(config)
        assert not answer and answer.family == "" and answer.method is None
        with pytest.raises(ValueError, match=reason):
            raise ValueError(answer.reason)


def test_what_a_model_says_beyond_its_config():
    model = tiny.build("llama")
    before = copy.deepcopy(model.state_dict())
    assert fastprompt.supports(model) and not hasattr(model, "_fastprompt_patch")
    assert model.config._attn_implementation == "sdpa"
    patch = fastprompt.patch(model)
    assert "patched already" in fastprompt.supports(model).reason
    patch.undo()
    assert fastprompt.supports(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert "patch first" in fastprompt.supports(nn.DataParallel(model)).reason
    assert "want a transformers PreTrainedModel" in fastprompt.supports(nn.Linear(2, 2)).reason
    llava = tiny.build("llava")
    llava.model.config.vision_feature_layer = 9
    assert "vision_feature_layer: want -4 .. 3" in fastprompt.supports(llava).reason
    assert fastprompt.supports(llava.config)


def test_a_model_around_a_host_that_nobody_knows():
    """Its towers must not be taken for a whole model."""

    class Other(tf.PreTrainedModel):
        config_class, _supports_sdpa = tf.LlavaConfig, True

        def __init__(self, config):
            super().__init__(config)
            self.language_model = tf.AutoModel.from_config(config.text_config)

    model = Other(tiny.build("llava").config)
    assert "Other: want a LlavaModel, alone or as `model`" in fastprompt.supports(model).reason


def test_the_readme_has_the_registrys_table():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    shown = readme.split(table.BEGIN)[1].split(table.END)[0]
    assert shown.strip() == table.markdown(), "run: python -m fastprompt.families"


@pytest.mark.parametrize("kind", REASONS)
def test_every_refused_architecture_by_its_config(kind):
    config = tf.AutoConfig.for_model(kind)
    found = fastprompt.supports(config)
    assert not found and REASONS[kind] in found.reason
