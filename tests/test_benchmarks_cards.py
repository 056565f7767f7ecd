"""The arithmetic of `benchmarks.card_bytes`, held against counted bytes of small real models."""

import json

import pytest
import torch
import transformers as tf

import fastprompt
from benchmarks import card_bytes, cards, llava, training
from benchmarks.card_bytes import OURS, REF, Card
from benchmarks.harness import _peak_mib
from benchmarks.m2pt_step import Case
from fastprompt import families
from fastprompt.concatenation import concatenate
from fastprompt.methods import VPT, DeepPrompts
from fastprompt.ops import layout

SHAPE = llava.shapes("cpu", True)["LLaVA-small b2"]
P = 4


def state_bytes(state):
    nested = state.absmax.nbytes + state.offset.nbytes + state.state2.absmax.nbytes
    return nested + state.code.nbytes  # state2.code is one table for all weights of a device


@pytest.mark.parametrize("sizes", [(64, 128), (96, 704), (1000, 64)])
def test_a_packed_weight(sizes):
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Sequential(torch.nn.Linear(*sizes))
    weight = llava.quantized(layer, torch.bfloat16)[0].weight
    counted = weight.nbytes + state_bytes(weight.quant_state)
    assert card_bytes.packed_bytes(sizes[0] * sizes[1]) == counted


@pytest.mark.parametrize("way", [REF, OURS])
def test_what_is_resident(way):
    """All parameters of a prepared model, gradients and moments of what trains, and for ours the
    projector that undo() would put back."""
    pytest.importorskip("bitsandbytes")
    case = Case(SHAPE, torch.bfloat16, "cpu")
    model = case.model()
    projector = sum(p.nbytes for p in model.model.multi_modal_projector.parameters())
    if way == REF:
        trained, projector = training.literal(case, model), 0
    else:
        trained = training.patched(case, model, training.HOST)
    weights = sum(p.nbytes for p in model.parameters())
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    weights += sum(state_bytes(state) for state in states if state is not None)
    rest = 12 * sum(p.numel() for p in trained.values())
    assert Card(SHAPE, way).resident == weights + projector + rest


def llama(width, inner, heads, kv, d, layers):
    config = tf.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, vocab_size=16,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=d, use_cache=False,
    )  # fmt: skip
    return tf.LlamaModel(config).to(torch.bfloat16).train()


def clip(width, inner, heads, layers):
    config = tf.CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=32, patch_size=8,
    )  # fmt: skip
    return tf.CLIPVisionModel(config).to(torch.bfloat16).train()


def kept(model, given):
    """Bytes of storages that a forward keeps for backward, weights apart."""
    frozen = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found, held = {}, []

    def pack(x):
        held.append(x)  # so that no address is taken twice
        storage = x.untyped_storage()
        if storage.data_ptr() not in frozen:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(**given)
    assert out.last_hidden_state.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(
    ("build", "sizes"),
    [(llama, (64, 96, 4, 2, 16)), (llama, (96, 160, 6, 6, 32)), (clip, (64, 192, 4))],
)
def test_what_a_literal_block_keeps(build, sizes):
    found = {}
    for layers in (2, 3):
        for size in (32, 64):
            model = build(*sizes, layers)
            if build is llama:
                concatenate(model, DeepPrompts(text=P))
                given, tokens = dict(input_ids=torch.ones(2, size, dtype=torch.long)), size
            else:
                concatenate(model, VPT(P))
                pixels = torch.randn(2, 3, size, size, dtype=torch.bfloat16)
                given = dict(pixel_values=pixels, interpolate_pos_encoding=True)
                tokens = (size // 8) ** 2
            found[layers, size] = kept(model, given), 2 * tokens
    more = [found[3, size][0] - found[2, size][0] for size in (32, 64)]
    a_token = (more[1] - more[0]) / (found[3, 64][1] - found[3, 32][1])
    parts = families.anatomy(model).towers[0].blocks[0].parts
    assert card_bytes.own_bytes(parts) == a_token


@pytest.mark.parametrize("way", [REF, OURS])
@pytest.mark.parametrize("sizes", [(64, 192, 4, 4, 16), (256, 704, 4, 4, 64)])
def test_one_block_in_backward(way, sizes, monkeypatch):
    """Within a seventh below what is counted, and not half above: it decides what fits.

    Norms and activations go by a few rows here, so that they hold as little as a card's kernels.
    """
    monkeypatch.setattr(layout, "PIECE", 1024)
    peaks = {}
    for N in (128, 384):
        model = llama(*sizes, 2)
        if way == REF:
            concatenate(model, DeepPrompts(text=P))
            training.checkpointing(model, training.ALL)
        else:
            fastprompt.patch(model, DeepPrompts(text=P), memory="low")
        x = torch.randn(1, N, sizes[0], dtype=torch.bfloat16, requires_grad=True)
        out = model(inputs_embeds=x).last_hidden_state
        gradient = torch.ones_like(out)
        peaks[N] = _peak_mib(lambda o=out, x=x, g=gradient: torch.autograd.grad(o, x, g), "cpu")
    a_token = (peaks[384] - peaks[128]) * 2**20 / 256
    parts = families.anatomy(llama(*sizes, 1)).towers[0].blocks[0].parts
    assert a_token / 1.15 < card_bytes.working_bytes(parts, way) < 1.5 * a_token


def test_ours_keeps_nothing_on_the_card_and_ref_its_inputs():
    shape = llava.Tuning(1, llava.LANGUAGE["7B"])
    ours, ref = Card(shape, OURS), Card(shape, REF)
    assert ours.kept("text") == ours.kept("vision") == 0
    assert ref.kept("text") == (1024 + 10) * 4096 * 2
    assert ours.step(2) < ref.step(2) < ref.step(3)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 8, 13, 63, 64, 200])
@pytest.mark.parametrize("known", [0, 1, 3])
def test_the_search_finds_the_largest(most, known):
    asked = []
    got = cards.largest(lambda b: asked.append(b) or b <= most, min(known, most))
    assert got == min(most, cards.MOST)
    assert len(asked) < 16


def test_as_many_layers_as_the_card_holds():
    card = Card(llava.Tuning(1, llava.LANGUAGE["72B"]), OURS)
    whole = card.resident + card.step(1)
    assert cards.layers_held(card, whole) == 80
    assert cards.layers_held(card, whole - 1) == 79
    assert cards.layers_held(card, whole - 10 * card.one_layer) == 70
    assert cards.layers_held(card, 0) == 1


def test_the_predicted_table(tmp_path, capsys):
    path = tmp_path / "cards.json"
    arguments = ["--predict", "--models", "7B", "--caps", "6", "8", "24", "--json", str(path)]
    assert cards.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["how"] for row in rows} == {"computed"}
    batch = {(row["way"], row["cap_gb"]): row["batch"] for row in rows}
    assert batch[OURS, 6] >= 4 > batch[REF, 6]  # the reach
    assert batch[OURS, 6] < batch[OURS, 8] < batch[OURS, 24]
    for row in rows:
        assert row["peak_gb"] is None or row["peak_gb"] <= row["cap_gb"]
    printed = capsys.readouterr().out
    assert "* computed from bytes, not measured" in printed and f"{batch[OURS, 6]}*" in printed


def test_a_card_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        cards.main([])
    assert "--predict" in capsys.readouterr().err


def test_measuring_takes_up_computed_rows(monkeypatch):
    """On a card that is imagined: what the caps are, and what stays computed."""
    shape = llava.Tuning(1, llava.LANGUAGE["7B"])
    card = Card(shape, OURS)

    class Steps:
        def __init__(self, case, way):
            self.card, self.peak_gb = Card(case.shape, way), {}

        def fits(self, batch, fraction):
            return self.card.resident + self.card.step(batch) <= fraction * 80 * cards.GB

    memory = type("Properties", (), dict(total_memory=80 * cards.GB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(cards, "_Steps", Steps)
    rows = cards.predicted(shape, OURS, (2, 6, 8))
    found = cards.measured(shape, OURS, rows)
    assert [row["how"] for row in found] == ["computed", "measured", "measured"]
    assert [row["batch"] for row in found] == [row["batch"] for row in rows]
    monkeypatch.setattr(memory, "total_memory", 4 * cards.GB)
    monkeypatch.setattr(Steps, "fits", lambda self, batch, fraction: batch <= 2)
    some = cards.layers_held(card, int(4 * cards.GB * cards.SHARE))
    assert some < 32
    how = cards.measured(shape, OURS, rows)[1]["how"]
    assert how == f"measured with {some} of 32 layers, the rest computed"
