"""A LLaVA of separate parts: what it is made of, that it saves and loads, and its processor."""

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from torch import nn

import fastprompt
from fastprompt.assembly import LinearLlavaForConditionalGeneration
from fastprompt.methods import M2PT

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = {"linear": LinearLlavaForConditionalGeneration, "mlp": tf.LlavaForConditionalGeneration}


def tokens(words=61):
    """As vicuna's: no pad token, no image token, an id for every row of the embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<unk>", "<s>", "</s>", "what", "is", "it", *map(str, range(words - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole CLIP and a language model with its tokenizer, as they lie on a disk."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    clip = tf.CLIPModel(tf.CLIPConfig(text_config=tiny.CLIP_TEXT, vision_config=tiny.VISION))
    clip.save_pretrained(root / "clip")
    tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(root / "clip")
    tongue = tiny.build("llama", hidden_size=64, head_dim=16)
    tongue.save_pretrained(root / "llama")
    tokens().save_pretrained(root / "llama")
    return clip, tongue, root


def four_bit():
    return tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def batch(processor, texts=("what <image> is it",)):
    images = [np.full((16, 16, 3), 40 * i, dtype=np.uint8) for i in range(len(texts))]
    return processor(images=images, text=list(texts), return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", KINDS)
def test_from_folders_to_logits_and_back_from_a_folder(folders, kind, tmp_path):
    clip, tongue, root = folders
    model = fastprompt.assemble(root / "clip", root / "llama", kind)
    assert type(model) is KINDS[kind] and not model.training
    processor = fastprompt.assemble_processor(model, root / "clip", root / "llama")
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    texts = ["what <image> is it", "<image> it"]
    given = batch(processor, texts)
    assert (given["input_ids"] == model.config.image_token_index).sum(1).tolist() == [4, 4]
    with torch.no_grad():
        want = model(**given).logits
        # the parts' own computation, by hand
        eye = clip.vision_model
        state = eye(given["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        x = tongue.get_input_embeddings()(given["input_ids"].clamp(max=63))
        image = (given["input_ids"] == model.config.image_token_index)[..., None]
        x = x.masked_scatter(image, model.model.multi_modal_projector(state))
        logits = tongue(inputs_embeds=x, attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(want[..., :64], logits)
    assert isinstance(model.model.multi_modal_projector, nn.Linear) == (kind == "linear")

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is KINDS[kind]
    loaded = tf.AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            again(**batch(loaded, ["what <image> is it", "<image> it"])).logits, want
        )
        got = again.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert got.shape[1] == given["input_ids"].shape[1] + 3


def test_new_rows_of_both_embeddings_are_the_mean(folders):
    _, tongue, root = folders
    model = fastprompt.assemble(root / "clip", root / "llama")
    assert model.config.image_token_index == 64 and model.config.text_config.vocab_size == 128
    for new, old in (
        (model.get_input_embeddings(), tongue.get_input_embeddings()),
        (model.lm_head, tongue.lm_head),
    ):
        assert torch.equal(new.weight[:64], old.weight)
        torch.testing.assert_close(new.weight[64:], old.weight.mean(0).expand(64, -1))


def test_a_token_that_has_room_resizes_nothing(folders):
    _, _, root = folders
    model = fastprompt.assemble(root / "clip", tiny.build("llama"), tokenizer=tokens(50))
    assert model.config.image_token_index == 53 and model.lm_head.out_features == 64
    processor = fastprompt.assemble_processor(model, root / "clip", tokens(50))
    assert (batch(processor)["input_ids"] == 53).sum() == 4


def test_four_bit_language_model(folders, tmp_path):
    _, _, root = folders
    given = four_bit()
    model = fastprompt.assemble(root / "clip", root / "llama", quantization_config=given)
    assert given.llm_int8_skip_modules is None  # the caller's stays as it is
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {k for n, k in kinds.items() if "language_model" in n} == {"Linear4bit"}
    assert {k for n, k in kinds.items() if "language_model" not in n} == {"Linear"}
    processor = fastprompt.assemble_processor(model, root / "clip", root / "llama")
    given = batch(processor)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert kinds == {
        n: type(m).__name__ for n, m in again.named_modules() if isinstance(m, nn.Linear)
    }
    patches = [fastprompt.patch(m, M2PT(3, 2)) for m in (model, again)]
    assert "of them in 4-bit" in patches[0].report()
    with torch.no_grad():
        for a, b in zip(*(p.trainable.values() for p in patches), strict=True):
            b.copy_(a)
        torch.testing.assert_close(again(**given).logits, model(**given).logits)
    model.train()(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in patches[0].trainable.values())


@pytest.mark.parametrize("vision", ["clip_vision", "siglip_vision"])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_from_models(vision, text):
    eye, tongue = tiny.build(vision), tiny.build(text)
    model = fastprompt.assemble(eye, tongue)
    assert model.model.vision_tower is eye and model.lm_head is tongue.lm_head
    own = vision == "clip_vision"
    assert model.config.vision_feature_select_strategy == ("default" if own else "full")
    given = tiny.inputs("llava")
    given["input_ids"][given["input_ids"] == 5] = model.config.image_token_index
    fastprompt.patch(model, M2PT(3, 2))
    model(**given).logits.sum().backward()
    assert model.model.multi_modal_projector.weight.grad.any()


def test_tied_embeddings_stay_tied(tmp_path):
    tongue = tiny.build("llama", tie_word_embeddings=True)
    model = fastprompt.assemble(tiny.build("clip_vision"), tongue)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_parts_get_one_dtype():
    model = fastprompt.assemble(tiny.build("clip_vision"), tiny.build("llama", torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    parts = tiny.build("clip_vision", torch.bfloat16), tiny.build("llama", torch.bfloat16)
    model = fastprompt.assemble(*parts, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_refusals(folders):
    _, _, root = folders
    eye, tongue = tiny.build("clip_vision"), tiny.build("llama")

    def refused(message, *args, **more):
        with pytest.raises(ValueError, match=message):
            fastprompt.assemble(*args, **more)

    refused("projector: want one of linear, mlp; got 'qformer'", eye, tongue, "qformer")
    refused("vision: want an encoder of .*clip.*; got LlamaForCausalLM", tongue, tongue)
    refused("language: want a causal language model, got CLIPVisionModel", eye, eye)
    refused("vision: want an encoder of .*; got LlamaModel", root / "llama", tongue)
    refused("want a folder or hub id, got a model", eye, tongue, quantization_config=four_bit())
    model = fastprompt.assemble(eye, tongue)
    with pytest.raises(
        ValueError, match="tokenizer: want <image> as 64, as the model has it; got 53"
    ):
        fastprompt.assemble_processor(model, root / "clip", tokens(50))
