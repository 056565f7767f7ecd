"""What `patch` promises, with a prompt pool: undo, files, copies, tasks, wrappers, refusals."""

import copy
import io
import pickle

import pytest
import tiny
import torch
from pooled import DUAL, METHODS, images, patched

import fastprompt
from fastprompt.methods import L2P, VPT, CODAPrompt, DeepPrompts, DualPrompt
from fastprompt.viz import attention_to_prompts


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["vit", "clip_vision"])
def test_undo_gives_the_old_model_bitwise(name, method):
    model, given = tiny.build(name), images(name, torch.float32)
    with torch.no_grad():
        before = tiny.output(name, model, given)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    names = {n: {*vars(m)} for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
    patch = fastprompt.patch(model, METHODS[method])
    tiny.output(name, model.train(), given).square().sum().backward()
    patch.undo()
    model.eval()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert names == {n: {*vars(m)} for n, m in model.named_modules()}
    assert hooks == {n: len(m._forward_hooks) for n, m in model.named_modules()}
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(tiny.output(name, model, given), before)
    with pytest.raises(ValueError, match="want a patch with L2P"):
        patch.auxiliary_loss()


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["vit", "clip_vision"])
def test_save_and_load(name, method, patched_before, tmp_path):
    model, patch, fresh = patched(name, METHODS[method], torch.float32)
    given = images(name, torch.float32)
    fastprompt.save(model, tmp_path)
    if patched_before:
        fastprompt.patch(fresh, METHODS[method])
    loaded = fastprompt.load(fresh, tmp_path)
    assert loaded.method == METHODS[method] and loaded.trainable.keys() == patch.trainable.keys()
    assert any(n.endswith("keys") for n in loaded.trainable)
    with torch.no_grad():
        assert torch.equal(tiny.output(name, fresh, given), tiny.output(name, model, given))


@pytest.mark.parametrize("method", list(METHODS))
def test_copies_are_models_of_their_own(method):
    model, _, _ = patched("vit", METHODS[method])
    given = images("vit")
    model(**given, labels=torch.tensor([0, 1, 2, 3])).loss.backward()  # leaves a graph behind
    for other in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        with torch.no_grad():
            want = model(**given).logits
            assert torch.equal(other(**given).logits, want)
            for p in fastprompt.patch_of(other).trainable.values():
                p.add_(1.0)
            assert torch.equal(model(**given).logits, want)
            assert not torch.equal(other(**given).logits, want)


def test_tasks_go_on_and_what_comes_later_is_not_seen():
    model, patch, _ = patched("vit", DUAL)
    given = images("vit")
    experts = [p for n, p in patch.trainable.items() if n.endswith("tokens") and p.ndim == 3]
    keys = patch.trainable["vit.fastprompt.keys"]

    def output():
        with torch.no_grad():
            return model(**given).logits

    before = output()
    with torch.no_grad():
        keys[2] = keys[0] * 1e3
        experts[0][2].add_(1.0)
    assert torch.equal(output(), before)  # the third task is not trained yet
    patch.set_task(2)
    assert patch.method.task == 2 and patch.pool.method is patch.method
    with torch.no_grad():
        keys.copy_(torch.eye(3, 32))
        with patch.query(torch.eye(3, 32)[[2, 1, 0, 2]].double()):
            assert not torch.equal(output(), before)
            model.train()
            trained = output()
        experts[0][0].add_(1.0)
        with patch.query(torch.zeros(4, 32).double()):
            assert torch.equal(output(), trained)  # in training the task's own alone
    for task in (3, -1, 1.0, True):
        with pytest.raises(ValueError, match=f"task: want a whole number 0 .. 2, got {task}"):
            patch.set_task(task)
    assert patch.method.task == 2

    coda = CODAPrompt(6, 2, layers=(0,), tasks=3)
    model, patch, _ = patched("vit", coda)
    before = output()
    with torch.no_grad():
        for p in patch.pool.prompts[0].parameters():
            p[2:].add_(1.0)
    assert torch.equal(output(), before)
    patch.set_task(2)
    assert not torch.equal(output(), before)
    model.train()(**given, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    for p in patch.pool.prompts[0].parameters():
        assert not p.grad[:4].any() and p.grad[4:].any()
    model, patch, _ = patched("vit", L2P())
    with pytest.raises(ValueError, match="set_task: want a method with tasks, got L2P"):
        patch.set_task(0)


@pytest.mark.parametrize("method", list(METHODS))
def test_attention_to_prompts_knows_sets(method):
    given = images("vit", torch.float32)
    model, patch, _ = patched("vit", METHODS[method], torch.float32)
    shares = attention_to_prompts(model, **given)
    assert len(shares) == len(patch.prompts)
    eager, _, _ = patched("vit", METHODS[method], torch.float32, attn_implementation="eager")
    with torch.no_grad():
        weights = eager(**given, output_attentions=True).attentions
    weights = [w for w in weights if w.shape[-1] > 5]  # the tokens are 5
    for share, w in zip(shares.values(), weights, strict=True):
        torch.testing.assert_close(share, w[..., :-5].sum(-1), rtol=1e-4, atol=1e-5)


def test_initial_values():
    for method in METHODS.values():
        patch = fastprompt.patch(tiny.build("vit"), method)
        for prompt in patch.pool.prompts:
            assert (prompt.tokens.flatten(0, -2).norm(dim=-1) > 0.01).all()
        if isinstance(method, CODAPrompt):
            for part in (prompt.tokens, prompt.keys, prompt.attention):
                x = part.flatten(1)
                torch.testing.assert_close(x @ x.T, torch.eye(len(x)), rtol=0, atol=1e-5)
        else:
            assert prompt.tokens.abs().max() <= (6 / (prompt.tokens.shape[-2] + 1) / 32) ** 0.5
            length = patch.pool.keys.norm(dim=1)
            assert length.min() > 0.6 and length.max() < 1.4


def test_report_says_how_many_blocks_and_what_trains():
    model = tiny.build("vit")
    text = fastprompt.patch(model, L2P(6, 2, 3)).report()
    assert "3 of 6 prompts of 2 rows × 1 of 3 blocks" in text
    assert "vit.fastprompt  192  (6 pool keys, trains)" in text
    text = fastprompt.patch(tiny.build("vit"), DUAL).report()
    assert "2 prompt rows × 1, 1 of 3 prompts of 3 rows × 2 of 3 blocks" in text


@pytest.mark.parametrize("method", ["l2p", "dual", "coda"])
def test_inside_ddp_and_torch_compile(method, tmp_path):
    """DDP without find_unused_parameters; compiled as one graph, query pass included."""
    model, patch, _ = patched("vit", METHODS[method], torch.float32)
    given = dict(images("vit", torch.float32), labels=torch.tensor([0, 1, 2, 3]))
    model.train()

    def step(wrapped):
        loss = wrapped(**given).loss
        loss.backward()
        gradients = [p.grad.clone() for p in patch.trainable.values()]
        model.zero_grad()
        return [loss.detach(), *gradients]

    want = step(model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            torch.testing.assert_close(step(wrapped), want)
    finally:
        torch.distributed.destroy_process_group()
    if method != "l2p":
        return  # compiling takes seconds
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(model, backend="eager", fullgraph=True)), want)


REFUSED = {
    "top_n: want a whole number 1 .. 4, got 5": L2P(4, 2, 5),
    "top_n: want a whole number 1 .. 4, got 0": L2P(4, 2, 0),
    "length: want a whole number 1 or more, got 0": L2P(length=0),
    "pool_size: want a whole number 1 or more, got 0": L2P(pool_size=0),
    "pull: want a number 0 or more, got -1": L2P(pull=-1),
    "L2P.layers: want a whole number 0 .. 2, got 3": L2P(layers=(0, 3)),
    r"layers: want different blocks, as \(0, 1\), got \(1, 1\)": L2P(layers=(1, 1)),
    r"layers: want different blocks, as \(0, 1\), got 0": L2P(layers=0),
    "L2P: want a block to prompt, got none": L2P(layers=()),
    "DualPrompt.e_layers: want a whole number 0 .. 2, got 3": DualPrompt(),
    "task: want a whole number 0 .. 9, got 10": DualPrompt(task=10),
    "tasks: want a whole number 1 or more, got 0": DualPrompt(tasks=0),
    "g_length: want a whole number 1 or more, got 0": DualPrompt(g_length=0),
    "none with a general one too": DualPrompt(g_layers=(0, 1), e_layers=(1, 2)),
    "want blocks with an expert prompt": DualPrompt(g_layers=(0,), e_layers=()),
    "pool_size: want a multiple of 3 tasks, got 10": CODAPrompt(10, layers=(0,), tasks=3),
    "ortho: want a number 0 or more, got inf": CODAPrompt(ortho=float("inf"), layers=(0,)),
    "CODAPrompt.layers: want a whole number 0 .. 2, got 3": CODAPrompt(),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_refusals(message):
    model = tiny.build("vit")
    with pytest.raises(ValueError, match=message):
        fastprompt.patch(model, REFUSED[message])
    assert all(p.requires_grad for p in model.parameters())


def test_refused_models():
    for method in (L2P(), DUAL, METHODS["coda"]):
        for name, message in {
            "llama": "want a vision tower; llama has text",
            "clip_text": "want a vision tower; clip has text",
            "llava": "want a vision model, got llava",
        }.items():
            with pytest.raises(ValueError, match=message):
                fastprompt.patch(tiny.build(name), method)
    for method in (VPT(2), DeepPrompts(vision=2)):
        patch = fastprompt.patch(tiny.build("vit"), method)
        calls = (
            (patch.set_task, (0,)),
            (patch.auxiliary_loss, ()),
            (patch.query, (0,)),
            (patch.features, (0,)),
        )
        for call, given in calls:
            with pytest.raises(ValueError, match="want a patch with L2P, DualPrompt or CODAPrompt"):
                call(*given)


def test_a_block_called_alone_says_that_nothing_was_chosen():
    model, _, _ = patched("vit", L2P(6, 2, 3))
    model(**images("vit"))  # whose choice is not kept
    with pytest.raises(ValueError, match=r"layers\.0: want a call from its tower's forward"):
        model.vit.layers[0](torch.zeros(1, 5, 32, dtype=torch.float64))
