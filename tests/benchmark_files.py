"""Small files in each benchmark's own format, and a tiny LLaVA that can be asked about them."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import tiny
import torch
import transformers as tf
from PIL import Image

SUBTASKS = (
    "existence count position color posters celebrity scene landmark artwork OCR "
    "commonsense_reasoning numerical_calculation text_translation code_reasoning"
)
SPLIT = ("posters", "celebrity", "scene", "landmark", "artwork")  # images and texts lie apart


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mme(root: Path, images: int = 1) -> None:
    for subtask in SUBTASKS.split():
        for n in range(images):
            folder = root / "mme" / subtask
            apart = subtask in SPLIT
            image(folder / ("images" if apart else "") / f"{n:04}.{'png' if n % 2 else 'jpg'}", n)
            text = folder / ("questions_answers_YN" if apart else "") / f"{n:04}.txt"
            text.parent.mkdir(exist_ok=True)
            ask = "Is this {}? Please answer yes or no.\t{}"
            text.write_text(f"{ask.format(subtask, 'Yes')}\n{ask.format('nothing', 'No')}\n\n")


def pope(root: Path) -> None:
    for seed, category in enumerate(("adversarial", "popular", "random")):
        rows = [
            {
                "question_id": n + 1,
                "image": f"COCO_val2014_{n // 2:012}.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for n, (thing, label) in enumerate([("cat", "yes"), ("dog", "no")] * 2)
        ]
        lines(root / "pope" / f"coco_pope_{category}.json", rows)
        for row in rows:
            image(root / "pope" / "val2014" / row["image"], seed)


def vsr(root: Path) -> Path:
    rows = [
        {"image": "000000050403.jpg", "caption": "The teddy bear is in front of the person."},
        {"image": "000000050403.jpg", "caption": "The cat is inside the sink."},
        {"image": "000000401552.jpg", "caption": "The umbrella is far away from the car."},
    ]
    for row, label in zip(rows, (1, 0, 1), strict=True):
        row |= {"label": label, "relation": "inside", "annotator_id": 31}
        image(root / "vsr" / "images" / row["image"])
    return lines(root / "vsr" / "test.jsonl", rows)


def snli_ve(root: Path) -> Path:
    labels = ("entailment", "neutral", "contradiction")
    rows = [
        {
            "annotator_labels": [label],
            "captionID": "2677109430.jpg#1",
            "gold_label": label,
            "pairID": f"2677109430.jpg#1r1{label[0]}",
            "sentence1": "A woman walks.",
            "sentence2": f"Someone {label}s.",
            "Flickr30K_ID": "2677109430",
        }
        for label in labels
    ]
    image(root / "snli_ve" / "flickr30k-images" / "2677109430.jpg")
    return lines(root / "snli_ve" / "snli_ve_test.jsonl", rows)


def textvqa(root: Path) -> Path:
    rows = [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "set_name": "val",
            "answers": ["nous les gosses"] * 4 + ["dakota"] * 3 + ["dakota digital"] * 2 + ["clos"],
        },
        {
            "question": "what number is on it?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34603,
            "set_name": "val",
            "answers": ["2"] * 10,
        },
    ]
    image(root / "textvqa" / "train_images" / "003a8ae2ef43b901.jpg")
    path = root / "textvqa" / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"dataset_type": "val", "dataset_version": "0.5.1", "data": rows}))
    return path


class Python2(pickle._Pickler):
    """Pickles as Python 2 wrote them: bytes are its strings, so they need no codec."""

    def save(self, thing: object, *args) -> None:
        if isinstance(thing, bytes):
            self.write(pickle.BINSTRING + struct.pack("<i", len(thing)) + thing)
        else:
            super().save(thing, *args)


def python2(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Python2(file, protocol=2).dump(content)


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]
CIFAR100 = [f"thing_{n}" for n in range(100)]


def cifar_pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar(root: Path, classes: int, version: str = "python", labels: tuple = (3, 8, 0)) -> None:
    data, names = cifar_pixels(len(labels)), CIFAR10 if classes == 10 else CIFAR100
    if version == "python":
        folder = "cifar10/cifar-10-batches-py" if classes == 10 else "cifar100/cifar-100-python"
        test, meta = ("test_batch", "batches.meta") if classes == 10 else ("test", "meta")
        key = b"labels" if classes == 10 else b"fine_labels"
        python2(root / folder / test, {b"data": data, key: list(labels), b"batch_label": b"1 of 1"})
        key = b"label_names" if classes == 10 else b"fine_label_names"
        python2(root / folder / meta, {key: [name.encode() for name in names]})
        return
    folder = "cifar10/cifar-10-batches-bin" if classes == 10 else "cifar100/cifar-100-binary"
    test, meta = (
        ("test_batch.bin", "batches.meta.txt")
        if classes == 10
        else ("test.bin", "fine_label_names.txt")
    )
    before = b"" if classes == 10 else b"\x13"  # the coarse label
    rows = (before + bytes([n]) + row.tobytes() for n, row in zip(labels, data, strict=True))
    (root / folder).mkdir(parents=True)
    (root / folder / test).write_bytes(b"".join(rows))
    (root / folder / meta).write_text("\n".join(names) + "\n\n")


def mnist(root: Path, labels: tuple = (7, 2, 1), end: str = ".gz", folder: str = "mnist") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    images = struct.pack(">IIII", 0x803, len(labels), 28, 28) + pixels.tobytes()
    numbers = struct.pack(">II", 0x801, len(labels)) + bytes(labels)
    pack = gzip.compress if end else bytes
    (root / folder / f"t10k-images-idx3-ubyte{end}").write_bytes(pack(images))
    (root / folder / f"t10k-labels-idx1-ubyte{end}").write_bytes(pack(numbers))


def everything(root: Path) -> Path:
    for write in (mme, pope, vsr, snli_ve, textvqa, mnist):
        write(root)
    cifar(root, 10)
    cifar(root, 100)
    return root


# ---- a model ----

# as llava-hf's: an answer comes after a space, which the prompt does not end with
CHAT = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzASTUERN0123456789 \n?.:,'"  # the rest is unknown


def tokenizer(join: bool = False) -> tf.PreTrainedTokenizerFast:
    """A token a letter; with ``join`` a colon and a space after it are one token."""
    from tokenizers import Tokenizer, decoders, models

    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<other>", "<image>", *LETTERS]
    merges = [(":", " ")] if join else []
    vocab = {token: n for n, token in enumerate(tokens + [a + b for a, b in merges])}
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    whole.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(join: bool = False) -> tf.LlavaProcessor:
    size = dict(height=16, width=16)
    return tf.LlavaProcessor(
        tf.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer(join),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def llava(dtype: torch.dtype = torch.float32) -> tf.LlavaForConditionalGeneration:
    """A tiny LLaVA that does not say image tokens, which would want an image."""
    model = tiny.build("llava", dtype)
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] = 0
    return model


def save_model(folder: Path) -> Path:
    """That model with its processor, as `from_pretrained` wants them."""
    llava().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def save_judge(folder: Path) -> Path:
    tiny.build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
