"""Attention that prompts get, as numbers and pictures; what a checkpoint's rows are like."""

import benchmark_files as files
import numpy as np
import pytest
import tiny
import torch
import zoo
from PIL import Image

import fastprompt
from fastprompt import viz
from fastprompt.inspecting import command as inspect_command
from fastprompt.inspecting import inspect, near
from fastprompt.methods import M2PT, VPT, DeepPrompts

P = 3


def patched(name, method):
    model = tiny.build(name)
    patch = fastprompt.patch(model, method)
    torch.manual_seed(0)
    for p in patch.trainable.values():
        p.data.normal_()
    patch.refresh()
    return model, patch


# ---- attention ----


def test_an_even_share_is_p_of_p_and_n():
    model, _ = patched("vit", VPT(P))
    given = tiny.inputs("vit")
    shares = viz.attention_to_prompts(model, **given)
    masses = viz.attention_mass(model, **given)
    assert list(masses) == list(shares) and len(masses) == len(model.vit.layers)
    for name, mass in masses.items():
        N = shares[name].shape[-1]
        assert mass.even == pytest.approx(P / (P + N))
        assert mass.share == pytest.approx(shares[name].mean().item())
        assert mass.ratio == pytest.approx(mass.share / mass.even)


def test_a_causal_models_even_share_is_of_what_each_token_sees_and_padding_does_not_count():
    model, _ = patched("llama", DeepPrompts(text=P))
    ids, mask = torch.randint(1, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    seen = [n + 1 for row in mask.sum(-1).tolist() for n in range(row)]
    want = np.mean([P / (P + n) for n in seen])
    for mass in viz.attention_mass(model, input_ids=ids, attention_mask=mask).values():
        assert mass.even == pytest.approx(want)
    alone = viz.attention_mass(model, input_ids=ids[1:, :4])
    both = viz.attention_mass(model, input_ids=ids[:1])
    whole = viz.attention_mass(model, input_ids=ids, attention_mask=mask)
    for name, mass in whole.items():
        assert mass.share == pytest.approx(
            (7 * both[name].share + 4 * alone[name].share) / 11, 1e-4
        )


def test_prompts_like_any_other_key_get_their_even_share():
    model, patch = patched("llama", DeepPrompts(text=P))
    for block in patch.anatomy.towers[0].blocks:
        torch.nn.init.zeros_(block.k_proj.weight)  # all scores are alike
    patch.refresh()
    for mass in viz.attention_mass(model, input_ids=torch.randint(1, 60, (2, 5))).values():
        assert mass.ratio == pytest.approx(1.0, 1e-5)


def test_patches_see_prompts_where_they_are():
    model, _ = patched("vit", VPT(P))
    given = tiny.inputs("vit")
    shares = viz.attention_to_prompts(model, **given)
    for name, maps in viz.patches_to_prompts(model, **given).items():
        _, rows, high, wide = maps.shape
        assert rows == P and high == wide
        patches = shares[name][:, :, -high * wide :].mean(1).unflatten(-1, (high, wide))
        torch.testing.assert_close(maps.sum(1), patches)
    with pytest.raises(ValueError, match=r"grid: want .*patches; .* tokens are not 9 x 9"):
        viz.patches_to_prompts(model, grid=(9, 9), **given)
    text, _ = patched("llama", DeepPrompts(text=P))
    with pytest.raises(ValueError, match="visual prompts, got none"):
        viz.patches_to_prompts(text, input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="patch"):
        viz.attention_mass(tiny.build("vit"), **given)


# ---- rows ----


def test_effective_rank_counts_directions():
    assert viz.effective_rank(torch.eye(4, 9)) == pytest.approx(4)
    assert viz.effective_rank(torch.ones(4, 9)) == pytest.approx(1)
    assert viz.effective_rank(torch.zeros(4, 9)) == 0
    half = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    assert viz.effective_rank(half) == pytest.approx(4 / 3**0.75)


def test_similarity_is_of_each_row_with_its_nearest():
    _, patch = patched("llama", DeepPrompts(text=2))
    first, second, *_ = (prompt.tokens.data for prompt in patch.prompts.values())
    first.zero_()[:, :2] = torch.eye(2)
    second.zero_()[:, :2] = torch.eye(2).flip(0) * 5  # the same rows, in another order
    matrix = viz.similarity(patch)["text"]
    assert matrix.shape == (len(patch.prompts),) * 2
    torch.testing.assert_close(matrix.diagonal(), torch.ones(len(matrix)))
    assert matrix[0, 1] == pytest.approx(1)
    second.zero_()[:, 2:4] = torch.eye(2)
    assert viz.similarity(patch)["text"][0, 1] == pytest.approx(0)


# ---- pictures ----


def pixel(figure, x, y):
    """The colour at data coordinates of the first axes."""
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())
    across, up = figure.axes[0].transData.transform((x, y))
    return drawn[round(drawn.shape[0] - up), round(across), :3] / 255


@pytest.fixture
def canvas():
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    return agg.FigureCanvasAgg


def test_a_head_that_attends_is_drawn_bright(canvas):
    import matplotlib

    shares = {name: torch.zeros(2, 4, 5) for name in "abc"}
    shares["b"][:, 2] = 0.8
    figure = viz.draw_attention(shares)
    canvas(figure)
    viridis = matplotlib.colormaps["viridis"]
    np.testing.assert_allclose(pixel(figure, 2, 1), viridis(1.0)[:3], atol=0.02)
    np.testing.assert_allclose(pixel(figure, 1, 1), viridis(0.0)[:3], atol=0.02)
    np.testing.assert_allclose(pixel(figure, 2, 0), viridis(0.0)[:3], atol=0.02)
    with pytest.raises(ValueError, match="as many heads"):
        viz.draw_attention(dict(a=torch.zeros(1, 2, 3), b=torch.zeros(1, 4, 3)))


def test_like_layers_are_drawn_alike(canvas):
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    figure = viz.draw_similarity(matrix)
    canvas(figure)
    np.testing.assert_allclose(pixel(figure, 0, 0), pixel(figure, 1, 1), atol=0.02)
    assert np.abs(pixel(figure, 0, 0) - pixel(figure, 1, 0)).max() > 0.3


def test_the_patch_that_attends_shines_through_the_image(canvas):
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0  # the second row of patches, the third column
    figure = viz.draw_overlay(Image.new("RGB", (64, 64), (0, 0, 255)), heat)
    canvas(figure)
    hot, cold = pixel(figure, 2.5 * 16, 1.5 * 16), pixel(figure, 1.5 * 16, 2.5 * 16)
    assert hot[0] > 0.5 > cold[0] and cold[2] == pytest.approx(0.4, abs=0.02)  # blue through black


# ---- fastprompt inspect ----


def test_a_checkpoint_is_looked_at_row_by_row(tmp_path, capsys):
    model, patch = patched("llama", DeepPrompts(text=P))
    fastprompt.save(model, tmp_path / "start")
    first = next(iter(patch.prompts)).removesuffix(".fastprompt")
    for name, prompt in patch.prompts.items():
        if name == f"{first}.fastprompt":
            prompt.tokens.data[0] *= 2
            prompt.tokens.data[2] = 0
        else:
            prompt.tokens.data += 1
    fastprompt.save(model, tmp_path / "end")
    look, *others = inspect(tmp_path / "end", tmp_path / "start")
    assert look.name == first and look.dead == [1, 2]  # one never moved, one is zero
    torch.testing.assert_close(look.moved, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(
        look.norms, patch.prompts[f"{first}.fastprompt"].tokens.detach().norm(dim=-1)
    )
    assert all(not other.dead for other in others)
    assert inspect(tmp_path / "end")[0].dead == [2] and inspect(tmp_path / "end")[0].moved is None
    assert inspect_command([str(tmp_path / "end"), "--start", str(tmp_path / "start")]) == 0
    said = capsys.readouterr().out
    assert first in said and "1, 2" in said and "moved" in said


def test_what_cannot_be_looked_at_is_named(tmp_path, capsys):
    model, _ = patched("llama", DeepPrompts(text=P))
    fastprompt.save(model, tmp_path / "a")
    other, _ = patched("llama", DeepPrompts(text=P + 1))
    fastprompt.save(other, tmp_path / "b")
    with pytest.raises(ValueError, match=r"want the prompts of .*a, got others"):
        inspect(tmp_path / "a", tmp_path / "b")
    bare, _ = patched("llava", M2PT(0, 0))
    fastprompt.save(bare, tmp_path / "c")
    assert inspect_command([str(tmp_path / "c")]) == 1
    assert "want prompts in it, got" in capsys.readouterr().err
    assert inspect_command([str(tmp_path / "a"), "--images", "x.png"]) == 1
    assert "want --model too" in capsys.readouterr().err


def test_nearest_words_and_patches_from_the_command_line(tmp_path, capsys):
    """Of a folder of transformers', as its user has it: rows that are a word's embedding."""
    from PIL import Image

    files.save_model(tmp_path / "model")
    model = files.llava()
    patch = fastprompt.patch(model, M2PT(P, P))
    words = model.get_input_embeddings().weight
    first = patch.anatomy.tower("text").blocks[0].name
    with torch.no_grad():
        patch.prompts[f"{first}.fastprompt"].tokens.copy_(words[[9, 8, 7]])
    fastprompt.save(model, tmp_path / "p")
    images = [tmp_path / name for name in ("a.png", "b.png")]
    for path, colour in zip(images, ("red", "blue"), strict=True):
        Image.new("RGB", (20, 14), colour).save(path)
    given = [str(tmp_path / "p"), "--model", str(tmp_path / "model"), "--images", *map(str, images)]
    assert inspect_command(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    tokenizer = files.processor().tokenizer
    for word in tokenizer.convert_ids_to_tokens([9, 8, 7]):
        assert repr(word) in said
    assert "words" in said and "patches" in said and "0:" in said


class Processor:
    """Tokens named by their ids, images as they are."""

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"<{i}>" for i in ids]

    tokenizer = Tokenizer()

    def __init__(self, pixels):
        self.pixels = pixels

    def image_processor(self, images, return_tensors):
        return {"pixel_values": self.pixels}


def test_rows_are_nearest_to_the_words_and_patches_that_they_are(tmp_path):
    from fastprompt.prefill import prefill

    model, patch = patched("llava", M2PT(P, P))
    pixels = tiny.inputs("llava")["pixel_values"]
    prefill(patch, torch.tensor([7, 8, 9]), pixels)
    text = next(n for n, t in ((b.name, t) for t in patch.anatomy.towers for b in t.blocks
                               if t.kind == "text"))  # fmt: skip
    fastprompt.save(model, tmp_path / "p")
    found = near(inspect(tmp_path / "p"), model, Processor(pixels), ["an image"] * len(pixels))
    looks = {look.name: look for look in found}
    assert [row[0] for row in looks[text].words] == ["<7>", "<8>", "<9>"]  # before the first block
    vision = [look for look in found if look.patches]
    assert len(vision) == sum("vision" in name for name in patch.prompts)
    for look in vision:  # row i is of image i mod B, and of patch i
        assert [row[0] for row in look.patches] == [(i % len(pixels), i) for i in range(P)]


@pytest.mark.parametrize(
    ("name", "front"), [("siglip_vision", 0), ("vit", 1), ("dinov3_vit", 3)], ids=lambda x: f"{x}"
)
def test_patches_are_counted_behind_class_token_and_registers(name, front, tmp_path):
    from fastprompt.prefill import hidden_states

    family = zoo if name in zoo.ROWS else tiny
    model, pixels = family.build(name), family.inputs(name, torch.float32)["pixel_values"]
    patch = fastprompt.patch(model, VPT(P))
    (tower,) = patch.anatomy.towers
    first, rows = tower.blocks[0], next(iter(patch.prompts.values())).tokens
    with torch.no_grad():
        rows.copy_(hidden_states(patch, tower, [first], pixels)[0][0, front : front + P])
    fastprompt.save(model, tmp_path)
    found = near(inspect(tmp_path), model, Processor(pixels), ["an image"] * len(pixels))
    assert [row[0] for row in found[0].patches] == [(0, i) for i in range(P)]
