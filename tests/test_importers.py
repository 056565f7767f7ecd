"""Checkpoints of M2PT's released code and trained projectors: what is read, what is refused."""

import json

import pytest
import tiny
import torch
from frozen import NF4, quantize
from official import Official
from safetensors.torch import save_file

import fastprompt
from fastprompt.importers import load_m2pt, load_projector, save_m2pt
from fastprompt.importers.shards import Shards
from fastprompt.methods import M2PT, DeepPrompts

VISION, TEXT = 3, 2  # rows
LAYERS = 3  # of either tower of the tiny model


def build(projector="linear", dtype=torch.float32):
    torch.manual_seed(0)
    parts = tiny.build("clip_vision", dtype), tiny.build("llama", dtype)
    return fastprompt.assemble(*parts, projector)


def names(kind):
    prefix = "vision_tower.vision_tower.vision_model.encoder." if kind == "vision" else ""
    return [f"model.{prefix}prompts.{i}" for i in range(LAYERS)]


def trained(dtype=torch.float32):
    """What the released code's trainer writes: prompts, projector, lm_head among a backbone."""
    torch.manual_seed(3)
    made = {name: torch.randn(1, VISION, 32) for name in names("vision")}
    made |= {name: torch.randn(1, TEXT, 32) for name in names("text")}
    made |= {"model.mm_projector.weight": torch.randn(32, 32)}
    made |= {"model.mm_projector.bias": torch.randn(32), "lm_head.weight": torch.randn(64, 32)}
    made |= {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(48, 32) for i in range(LAYERS)}
    return {name: t.to(dtype) for name, t in made.items()}


def write(folder, tensors, ending="bin", shards=2):
    """As Trainer does: shards and an index."""
    save = torch.save if ending == "bin" else save_file
    stem = "pytorch_model" if ending == "bin" else "model"
    order = sorted(tensors)
    index = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        part = order[i::shards]
        save({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def given(dtype=torch.float32, rows=4 + VISION):
    torch.manual_seed(1)
    ids = torch.randint(6, 63, (2, rows + 5))
    ids[:, 1 : 1 + rows] = 64  # the image token: the first row after the vocabulary
    pixels = torch.randn(2, 3, 16, 16, dtype=dtype)
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or given())).logits


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_imported_bundle_computes_what_the_released_code_does(tmp_path, ending, dtype):
    tensors = trained(dtype)
    write(tmp_path, tensors, ending)
    model = build(dtype=torch.float64)
    tiny.in_float64(model)
    patch = load_m2pt(model, tmp_path)
    assert patch.method == M2PT(VISION, TEXT, train_lm_head=True, visual_prompts="raw")
    prompts = ([tensors[name].double() for name in names(kind)] for kind in ("vision", "text"))
    official = Official(model, *prompts)
    head = torch.cat([tensors["lm_head.weight"].double(), model.lm_head.weight[64:]])
    official.w |= {
        "lm_head.weight": head,
        "model.multi_modal_projector.weight": tensors["model.mm_projector.weight"].double(),
        "model.multi_modal_projector.bias": tensors["model.mm_projector.bias"].double(),
    }
    batch = given(torch.float64)
    want, _ = official(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    torch.testing.assert_close(logits(model, batch), want, rtol=1e-10, atol=1e-10)


def test_every_imported_tensor_changes_the_logits(tmp_path):
    """Users of the released code got chance-level scores from prompts that were silently unread."""
    tensors = trained()
    write(tmp_path, tensors)
    model = build()
    load_m2pt(model, tmp_path)
    want = logits(model)
    for name in tensors:
        if "layers" in name:
            continue
        folder = tmp_path / name
        folder.mkdir()
        write(folder, tensors | {name: tensors[name] * 1.5})
        other = build()
        load_m2pt(other, folder)
        assert not torch.allclose(logits(other), want), name


def test_a_model_inside_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    write(tmp_path, trained())
    model = build()
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]))
    assert load_m2pt(lora, tmp_path).model is model
    assert load_projector(lora, tmp_path) is model.model.multi_modal_projector


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["dense", NF4])
def test_export_and_import_again(tmp_path, kind, patched):
    def fresh():
        return quantize(build()) if kind == "nf4" else build()

    method = M2PT(VISION, TEXT, train_lm_head=True, visual_prompts="raw")
    model = fresh()
    patch = fastprompt.patch(model, method)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.add_(torch.randn_like(p))
    path = save_m2pt(patch, tmp_path / "new" / "pytorch_model.bin")
    found = torch.load(path, weights_only=True)
    assert sorted(found) == sorted(n for n in trained() if "layers" not in n)
    assert all(found[name].shape[:2] == (1, VISION) for name in names("vision"))
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight[:64])
    other = fresh()
    if patched:
        load_m2pt(fastprompt.patch(other, method), path)
    else:
        load_m2pt(other, path.parent)
    assert torch.equal(logits(other)[..., :64], logits(model)[..., :64])


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    write(tmp_path, trained(), "safetensors")
    seen, read = [], Shards._tensor

    def watch(self, name, file):
        seen.append(name)
        return read(self, name, file)

    monkeypatch.setattr(Shards, "_tensor", watch)
    load_m2pt(build(), tmp_path, visual_prompts="drop", lm_head=False)
    projector = ["model.mm_projector.weight", "model.mm_projector.bias"]
    assert sorted(seen) == sorted([*names("vision")[:-1], *names("text"), *projector])


def test_a_file_is_mapped_not_read(tmp_path, monkeypatch):
    write(tmp_path, trained())
    options, load = [], torch.load

    def watch(*args, **more):
        options.append(more)
        return load(*args, **more)

    monkeypatch.setattr(torch, "load", watch)
    load_m2pt(build(), tmp_path)
    assert len(options) == 2 and all(o["mmap"] and o["weights_only"] for o in options)


def test_prompts_alone_in_one_file(tmp_path):
    tensors = {n: t for n, t in trained().items() if "prompts" in n}
    torch.save(tensors, tmp_path / "prompts.bin")
    patch = load_m2pt(build("mlp"), tmp_path / "prompts.bin")
    assert patch.method == M2PT(VISION, TEXT, train_projector=False, visual_prompts="raw")
    text = {n: t for n, t in tensors.items() if "vision" not in n}
    torch.save(text, tmp_path / "text.bin")
    patch = load_m2pt(build("mlp"), tmp_path / "text.bin")
    assert patch.method == M2PT(0, TEXT, train_projector=False)


def refused(message, path, model=None, load=load_m2pt, **more):
    model = model or build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load(model, path, **more)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)


def test_refusals(tmp_path):
    def folder(change, **how):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        tensors = trained()
        change(tensors)
        write(path, tensors, **how)
        return path

    middle, last = names("vision")[1:]
    message = "want a prompt for every layer; missing .*encoder.prompts.1"
    refused(message, folder(lambda t: t.pop(middle)))
    path = folder(lambda t: t.pop(last))
    refused("missing .*encoder.prompts.2", path)
    load_m2pt(build(), path, visual_prompts="drop")  # which never reads the last one
    refused("missing model.prompts.0", folder(lambda t: t.pop(names("text")[0])))
    wide = folder(lambda t: t.update({middle: torch.randn(1, VISION, 48)}))
    refused(r"encoder.prompts.1: want \[1, 3, 32\], got \[1, 3, 48\]", wide)
    empty = folder(lambda t: t.update({n: torch.empty(0) for n in t if "prompts" in n}))
    refused(r"encoder.prompts.0: want \[1, P, 32\], got \[0\]", empty)  # DeepSpeed's stand-ins
    deep = folder(lambda t: t.update({"model.prompts.3": torch.randn(1, TEXT, 32)}))
    refused("holds 4 layers of text prompts; the model has 3", deep)
    refused(
        "want prompts named model.prompts.0",
        folder(lambda t: [t.pop(n) for n in list(t) if "prompts" in n]),
    )
    many = folder(lambda t: t.update({"lm_head.weight": torch.randn(200, 32)}))
    refused(r"lm_head.weight: want at most \[128, 32\], got \[200, 32\]", many)
    good = folder(lambda t: None)
    refused("want a projector of 2 linear layers .*got one of 1 linear layer", good, build("mlp"))
    patched = build()
    fastprompt.patch(patched, M2PT(VISION, TEXT))
    other = r"holds M2PT\(.*'raw'\); the model is patched with M2PT\(.*'drop'\)"
    refused(other, good, patched)
    refused("want a vision-language model, got llama", good, tiny.build("llama"))
    refused("want a file, or a folder with one of", tmp_path / "nothing")

    for ending in ("bin", "safetensors"):
        wrong = tmp_path / ending
        wrong.mkdir()
        index = write(wrong, trained(), ending)
        stem = "pytorch_model" if ending == "bin" else "model"
        moved = dict.fromkeys(index, index["lm_head.weight"])
        (wrong / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": moved}))
        for look in (Shards.at(wrong).read, Shards.at(wrong).shapes):
            with pytest.raises(
                ValueError, match=f"{ending}: want model.* in it, as the index says"
            ):
                look(list(index))

    (good / "pytorch_model-00002-of-00002.bin").unlink()
    refused("pytorch_model-00002-of-00002.bin", good)
    for text in ("{}", "[]", '["weight_map"]', "3"):
        (good / "pytorch_model.bin.index.json").write_text(text)
        refused("index.json: want an index with a weight_map", good)
    for text in ('{"weight_map": ["a.bin"]}', '{"weight_map": {"a": 1}}'):
        (good / "pytorch_model.bin.index.json").write_text(text)
        refused("index.json: want names of files in its weight_map", good)


@pytest.mark.parametrize("what", ["a byte of a prompt", "a byte of the names", "its end"])
def test_a_damaged_shard_is_named(tmp_path, what):
    index = write(tmp_path, trained())
    name = names("text")[1]
    file = tmp_path / index[name]
    data = bytearray(file.read_bytes())
    if what == "its end":
        data = data[: len(data) // 2]
    else:
        tensor = trained()[name].numpy().tobytes()
        place = data.find(tensor) + 9 if "prompt" in what else data.find(name.encode()) + 14
        data[place] ^= 0x40
    file.write_bytes(data)
    refused(file.name + ": (damaged: .*prompts.1 fails its CRC|want a whole file)", tmp_path)


def test_a_damaged_backbone_in_the_same_shard_does_not_matter(tmp_path):
    tensors = trained()
    write(tmp_path, tensors, shards=1)
    file = tmp_path / "pytorch_model-00001-of-00001.bin"
    data = bytearray(file.read_bytes())
    data[data.find(tensors["model.layers.1.mlp.up_proj.weight"].numpy().tobytes())] ^= 1
    file.write_bytes(data)
    load_m2pt(build(), tmp_path)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"model.prompts.0": Evil()}, tmp_path / "evil.bin")
    refused("evil.bin: want a whole file of tensors", tmp_path / "evil.bin")
    torch.save([1], tmp_path / "list.bin")
    refused("list.bin: want tensors by name, got a list", tmp_path / "list.bin")
    assert not (tmp_path / "ran").exists()


def test_a_file_older_than_torch_1_6(tmp_path):
    torch.save(trained(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    load_m2pt(build(), tmp_path / "old.bin")
    (tmp_path / "old.bin").write_bytes((tmp_path / "old.bin").read_bytes()[:-500])
    refused("old.bin: want a whole file", tmp_path / "old.bin")


def test_export_refuses_what_the_released_code_has_no_name_for(tmp_path):
    for method, kind, message in (
        (M2PT(VISION, TEXT), "linear", r"want M2PT\(visual_prompts='raw'\), got .*'drop'"),
        (DeepPrompts(text=2), "linear", "want M2PT"),
        (M2PT(VISION, TEXT, visual_prompts="raw"), "mlp", "want one linear projector, got Llava"),
        (
            M2PT(VISION, TEXT, visual_prompts="raw", layers="odd"),
            "linear",
            "want a prompt in every layer, .* got layers='odd'",
        ),
        (M2PT(0, TEXT, layers="0"), "linear", "want a prompt in every layer"),
        (M2PT(0, {1: TEXT}), "linear", "want prompts of one length in all layers"),
    ):
        patch = fastprompt.patch(build(kind), method)
        with pytest.raises(ValueError, match=message):
            save_m2pt(patch, tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


# ---- projectors ----


def projector_of(model):
    return {n: p.clone() for n, p in model.model.multi_modal_projector.named_parameters()}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("of", ["ours", "llava", "transformers"])
def test_a_projector_of_every_origin(tmp_path, of, kind, patched):
    source = build(kind)
    with torch.no_grad():
        for p in source.model.multi_modal_projector.parameters():
            p.normal_()
    if of == "ours":
        fastprompt.patch(source, M2PT(0, 0))
        fastprompt.save(source, tmp_path)
        path = tmp_path
    elif of == "llava":
        own = {"weight": "weight", "bias": "bias"}
        if kind == "mlp":
            own = {f"linear_{i + 1}.{leaf}": f"{2 * i}.{leaf}" for i in (0, 1) for leaf in own}
        path = tmp_path / "mm_projector.bin"
        tensors = projector_of(source)
        torch.save({f"model.mm_projector.{own[n]}": t.half() for n, t in tensors.items()}, path)
    else:
        source.save_pretrained(tmp_path)
        path = tmp_path
    want = projector_of(source)
    torch.manual_seed(9)
    model = fastprompt.assemble(tiny.build("clip_vision"), tiny.build("llama"), kind)
    assert not any(torch.equal(p, want[n]) for n, p in projector_of(model).items())
    if patched:
        fastprompt.patch(model, M2PT(2, 2))
    assert load_projector(model, path) is model.model.multi_modal_projector
    for name, p in projector_of(model).items():
        torch.testing.assert_close(p, want[name].half().float() if of == "llava" else want[name])


def quantize_projector(model):
    from bitsandbytes.nn import Linear4bit

    new = Linear4bit(32, 32, compute_dtype=torch.float32, quant_type="nf4")
    new.load_state_dict(model.model.multi_modal_projector.state_dict())
    model.model.multi_modal_projector = new.to("cpu").requires_grad_(False)
    return model


def test_a_four_bit_projector_that_trains_is_dense(tmp_path):
    file, tensors = tmp_path / "mm_projector.bin", {"weight": torch.eye(32), "bias": torch.ones(32)}
    torch.save({f"model.mm_projector.{name}": t for name, t in tensors.items()}, file)
    model = quantize_projector(build())
    fastprompt.patch(model, M2PT(0, 0))
    assert torch.equal(load_projector(model, file).weight, torch.eye(32))


def test_projectors_refused(tmp_path):
    file = tmp_path / "mm_projector.bin"

    def saved(tensors):
        torch.save({f"model.mm_projector.{name}": t for name, t in tensors.items()}, file)
        return file

    w, b = torch.randn(32, 32), torch.randn(32)
    load = dict(load=load_projector)
    want = r"want a projector of 1 linear layer \(weight \[32, 32\], bias \[32\]\), "
    two = {"0.weight": w, "0.bias": b, "2.weight": w, "2.bias": b}
    refused(want + "got one of 2 linear layers", saved(two), **load)
    wide = saved({"weight": torch.randn(48, 32), "bias": torch.randn(48)})
    refused(want + r"got one of .*\(weight \[48, 32\], bias \[48\]\)", wide, **load)
    alone = saved({"weight": w})
    refused(want + r"got one of 1 linear layer \(weight \[32, 32\]\)", alone, **load)
    packed = quantize_projector(build())
    refused("want a dense projector, got a 4-bit one: patch the model", alone, packed, **load)
    torch.save({"other": w}, file)
    refused("want a projector .* in it", file, **load)
    refused("want a vision-language model, got llama", file, tiny.build("llama"), **load)
