"""fastprompt's M2PT against the official computation in plain PyTorch, in float64."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from frozen import relative
from official import Official
from torch import nn

import fastprompt
from fastprompt.methods import M2PT

VISION_ROWS, TEXT_ROWS = 3, 2


def rows(shown):
    """Image tokens: the tiny model has four patches."""
    return 4 + (VISION_ROWS if shown != "drop" else 0)


def given(shown, padded=False):
    torch.manual_seed(1)
    n = rows(shown)
    ids = torch.randint(6, 63, (2, n + 8))
    ids[:, 1 : 1 + n] = 5
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : n + 3] = -100  # BOS, image and instruction
    if padded:
        ids[1, -3:], mask[1, -3:], labels[1, -3:] = 0, 0, -100
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)


def both(shown, **more):
    """A patched model and the official computation, of the same weights and prompts."""
    model = tiny.build("llava", torch.float64, **more)
    tiny.in_float64(model)
    options = dict(train_lm_head=True, visual_prompts=shown)
    patch = fastprompt.patch(model, M2PT(VISION_ROWS, TEXT_ROWS, **options), logits=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in patch.trainable.values():
            p.copy_(torch.randn_like(p) * 0.3)
    theirs = {}
    for tower, depth, D in (("vision_tower.encoder", 3, 32), ("language_model", 3, 32)):
        P = VISION_ROWS if tower.startswith("vision") else TEXT_ROWS
        for i in range(depth):
            name = f"model.{tower}.layers.{i}.fastprompt"
            ours = patch.prompts.get(name)  # the last of the vision tower is read by "raw" alone
            new = torch.zeros(P, D, dtype=torch.float64) if ours is None else ours.tokens.detach()
            theirs[name] = new.clone()[None].requires_grad_(True)
    prompts = list(theirs.values())
    official = Official(model, prompts[:3], prompts[3:])
    for part in ("multi_modal_projector", "lm_head"):  # leaves of its own
        for name in [n for n in official.w if part in n]:
            theirs[name] = official.w[name] = official.w[name].detach().clone().requires_grad_(True)
    return model, patch, official, theirs


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("shown", ["drop", "raw", "context"])
def test_logits_loss_and_every_gradient(shown, padded):
    model, patch, official, theirs = both(shown)
    batch = given(shown, padded)
    got = model.train()(**batch)
    logits, loss = official(
        batch["input_ids"], batch["pixel_values"], batch["attention_mask"], batch["labels"], shown
    )
    seen = batch["attention_mask"].bool()
    assert relative(got.logits[seen], logits[seen]) < 1e-10
    # transformers computes its loss in float32
    assert relative(got.loss.double(), loss) < 1e-6
    ours = F.cross_entropy(got.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert relative(ours, loss) < 1e-10
    ours.backward()
    loss.backward()
    for name, p in patch.trainable.items():
        want = theirs[name.removesuffix(".tokens")].grad
        assert want.abs().max() > 0, name
        assert relative(p.grad, want.reshape(p.shape)) < 1e-10, name


@pytest.mark.parametrize("shown", ["drop", "raw", "context"])
def test_generated_tokens(shown):
    model, _, official, _ = both(shown)
    batch = given(shown)
    ids, mask, pixels = (batch[k] for k in ("input_ids", "attention_mask", "pixel_values"))
    with torch.no_grad():
        got = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=5,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        for _ in range(5):
            logits, _ = official(ids, pixels, torch.ones_like(ids), shown=shown)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


def test_the_first_raw_row_and_no_other_has_no_influence():
    """The released code takes one row off the front: with prompts there, a prompt's."""
    model, patch, *_ = both("raw")
    model(**given("raw")).loss.backward()
    grad = patch.prompts["model.vision_tower.encoder.layers.2.fastprompt"].tokens.grad
    assert not grad[0].any() and grad[1:].any(dim=-1).all()


@pytest.mark.parametrize("P, D", [(1, 8), (10, 32)])
def test_initialisation_is_xavier_uniform_over_1_P_D(P, D):
    torch.manual_seed(5)
    want = nn.init.xavier_uniform_(torch.empty(1, P, D))
    torch.manual_seed(5)
    assert torch.equal(M2PT().init_(torch.empty(P, D)), want[0])
