"""L2P, DualPrompt and CODA-Prompt against rows written in front of each sample's own tokens."""

import dataclasses
import inspect

import pytest
import tiny
import torch
import torch.nn.functional as F
from pooled import METHODS, B, images, patched, relative

import fastprompt
from fastprompt.families import anatomy
from fastprompt.methods import L2P, CODAPrompt
from fastprompt.pools import pool as pools

MODELS = ["vit", "dinov2", "clip_vision"]


class Written:
    """Stands in for ``layer.forward``: rows in front of the tokens, and off again."""

    def __init__(self, layer, rows):
        self.layer, self.rows = layer, rows

    def __call__(self, hidden_states, *args, **kwargs):
        x = torch.cat([self.rows[None], hidden_states], dim=1)
        return type(self.layer).forward(self.layer, x, *args, **kwargs)[:, len(self.rows) :]


def feature(name, out):
    return out.pooler_output if name == "clip_vision" else out.last_hidden_state[:, 0]


def rows_of(method, values, block, keys, query, training):
    """[P, D] of one sample in one block, and the cosines that are pulled."""
    tokens = values.get(f"{block.name}.fastprompt.tokens")
    if isinstance(method, CODAPrompt):
        if tokens is None:
            return None, None
        K, A = (values[f"{block.name}.fastprompt.{part}"] for part in ("keys", "attention"))
        old, used = 2, 4  # two components a task, the second task
        rows = 0
        for m in range(used):
            P_m, K_m, A_m = (x[m].detach() if m < old else x[m] for x in (tokens, K, A))
            rows = rows + F.cosine_similarity(query * A_m, K_m, dim=0) * P_m
        return rows, None
    cosines = F.cosine_similarity(query[None], keys)
    if isinstance(method, L2P):
        chosen = cosines.topk(method.top_n).indices
    else:
        chosen = torch.tensor([1]) if training else cosines[:2].topk(1).indices  # task 1 of 3
    if tokens is None or tokens.ndim == 2:
        return tokens, cosines[chosen]
    return tokens[chosen].flatten(0, 1), cosines[chosen]


def literal(name, method, model, values, given, training=False):
    """Outputs of each sample run alone with its rows written, and the method's loss."""
    tower = anatomy(model).tower("vision")
    keys = values.get(f"{tower.name}.fastprompt.keys".removeprefix("."))
    outs, lacks = [], []
    for i in range(B):
        one = {k: v[i : i + 1] for k, v in given.items()}
        with torch.no_grad():
            query = feature(name, tower.model(**one))[0]
        for block in tower.blocks:
            rows, cosines = rows_of(method, values, block, keys, query, training)
            if rows is not None:
                block.layer.forward = Written(block.layer, rows)
        outs.append(tiny.output(name, model, one))
        if cosines is not None:
            lacks.append((1 - cosines).sum())
        for block in tower.blocks:
            vars(block.layer).pop("forward", None)
    if lacks:
        return torch.cat(outs), method.pull * sum(lacks) / B
    loss = 0
    for n, v in values.items():
        if "fastprompt" in n:
            x = torch.cat([v[:2].detach(), v[2:4]]).flatten(1)
            loss = loss + method.ortho * (x @ x.T - torch.eye(4)).square().mean()
    return torch.cat(outs), loss


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", MODELS)
def test_outputs_loss_and_gradients_are_those_of_written_rows(name, method, training):
    method = METHODS[method]
    model, patch, theirs = patched(name, method)
    theirs.requires_grad_(False)
    values = {n: p.detach().clone().requires_grad_() for n, p in patch.trainable.items()}
    head = {n.removeprefix("classifier."): v for n, v in values.items() if "classifier" in n}
    if head:
        theirs.classifier.load_state_dict(head)
    given = images(name)
    want, want_loss = literal(name, method, theirs, values, given, training)
    model.train(training)
    got = tiny.output(name, model, given)
    loss = patch.auxiliary_loss()
    assert relative(got, want) < 1e-10 and relative(loss, want_loss) < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(tiny.output(name, model, given), got, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(want)
    ((got * direction).sum() + loss).backward()
    ((want * direction).sum() + want_loss).backward()
    for n, p in patch.trainable.items():
        if "fastprompt" in n:
            assert p.grad.any() and relative(p.grad, values[n].grad) < 1e-10, n
    assert all((p.grad is not None) == (n in patch.trainable) for n, p in model.named_parameters())
    assert relative(tiny.output(name, theirs, given), want) > 1e-3, "the prompts do nothing"


WHOLE_POOL = {"l2p all": L2P(3, 2, 3, batchwise=True)}  # one choice for the batch, of every entry


@pytest.mark.parametrize("method", [*METHODS, *WHOLE_POOL])
def test_a_batch_is_its_samples_alone(method):
    """Which a majority vote would break."""
    model, _, _ = patched("vit", (METHODS | WHOLE_POOL)[method])
    given = images("vit")["pixel_values"]
    with torch.no_grad():
        together = model(given).logits
        alone = torch.cat([model(one[None]).logits for one in given])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.fixture
def queries(monkeypatch):
    """Every feature that a query pass gave."""
    seen, whole = [], pools.image_feature

    def record(*args):
        seen.append(whole(*args))
        return seen[-1]

    monkeypatch.setattr(pools, "image_feature", record)
    return seen


@pytest.mark.parametrize("method", ["l2p", "dual"])
def test_a_batchwise_choice_is_the_majority_s(method, queries):
    method = dataclasses.replace(METHODS[method], batchwise=True)
    model, patch, _ = patched("vit", method)
    chosen, k = [], method.top_n if isinstance(method, L2P) else 1
    model.vit.register_forward_pre_hook(
        lambda module, args, kwargs: chosen.append(kwargs["fastprompt_choice"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**images("vit", batch=5))
    keys = patch.pool.keys[: 6 if k > 1 else 2]  # the third task is not trained yet
    cosines = F.cosine_similarity(queries[0][:, None], keys[None], dim=-1)
    votes = cosines.topk(k).indices.flatten().tolist()
    most = sorted({*votes}, key=lambda entry: (-votes.count(entry), entry))[:k]
    assert chosen[0].tolist() == [most] and len({*votes}) > k
    pull = method.pull * (1 - cosines[:, most]).sum() / 5
    torch.testing.assert_close(patch.auxiliary_loss(), pull)


@pytest.mark.parametrize("method", list(METHODS))
def test_no_row_is_projected_that_is_not_needed(method):
    model, _, _ = patched("vit", METHODS[method])
    layer, rows = model.vit.layers[1 if method in ("l2p of one", "dual") else 0], []
    layer.attention.k_proj.register_forward_hook(lambda m, args, _: rows.append(args[0].shape[:2]))

    def run(batch):
        rows.clear()
        with torch.no_grad():
            model(**images("vit", batch=batch))
        return [(s, p) for s, p in map(tuple, rows) if p != 5]  # the tokens are 5

    once = {"l2p": (1, 12), "l2p of one": (1, 8), "l2p of many": (4, 4)}
    expected = {**once, "dual": (1, 9), "coda": (4, 2)}[method]
    assert run(4) == [expected]
    kept = method in ("l2p", "l2p of one", "dual")  # the whole pool, in evaluation
    assert run(4) == ([] if kept else [expected])
    alone = {"l2p": (1, 6), "dual": (1, 3), "coda": (1, 2)}.get(method, (1, 2))
    assert run(1) == [(1, 4) if method == "l2p of many" else alone]
    model.train()
    assert run(4) == [(1, 3) if method == "dual" else expected]


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_through_the_kernels(method):
    """float32, the op's own code; attention dropout's and eager attention's ways in float64."""
    given = images("vit")
    model, _, _ = patched("vit", METHODS[method])
    want = model(**given).logits
    in32, patch, _ = patched("vit", METHODS[method], torch.float32)
    other = {n: p.float() for n, p in fastprompt.patch_of(model).trainable.items()}
    with torch.no_grad():
        for n, p in patch.trainable.items():
            p.copy_(other[n])
    got = in32(given["pixel_values"].float()).logits
    assert relative(got.double(), want) < 1e-4
    got.square().sum().backward()
    want.square().sum().backward()
    for n, p in fastprompt.patch_of(model).trainable.items():
        if p.grad is not None:  # a pool's keys get theirs from the pull alone
            assert relative(patch.trainable[n].grad.double(), p.grad) < 1e-3

    dropping, _, _ = patched("vit", METHODS[method], attention_probs_dropout_prob=1e-13)
    eager, _, _ = patched("vit", METHODS[method], attn_implementation="eager")
    model.train()
    want = model(**given).logits
    assert relative(dropping.train()(**given).logits, want) < 1e-10
    out = eager.train()(**given, output_attentions=True)
    assert relative(out.logits, want) < 1e-6  # transformers' own softmax there is float32
    assert {w.shape[-1] - w.shape[-2] for w in out.attentions} - {0}  # prompts among the keys


@pytest.mark.parametrize("method", list(METHODS))
def test_the_query_pass_runs_once_without_dropout_or_prompts(method, queries):
    model, patch, before = patched("vit", METHODS[method], hidden_dropout_prob=0.4)
    given, passes = images("vit"), []
    model.vit.layers[0].mlp.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        want = before.vit(**given).last_hidden_state[:, 0]
    model.train()
    was_training = [m.training for m in model.modules()]
    model(**given, output_hidden_states=True).logits.sum().backward()
    assert len(queries) == 1 and len(passes) == 2 and torch.equal(queries[0], want)
    assert was_training == [m.training for m in model.modules()] and not queries[0].requires_grad

    model.eval()
    with torch.no_grad():
        out = model(**given).logits
        assert torch.equal(patch.features(**given), want)
        passes.clear()
        with patch.query(want):
            assert torch.equal(model(**given).logits, out) and len(passes) == 1
            assert not torch.equal(model(given["pixel_values"].flip(0)).logits, out.flip(0))
        assert torch.equal(model(**given).logits, out)
    features, pixels = torch.randn_like(want).requires_grad_(), given["pixel_values"].clone()
    with patch.query(features):
        model(**given, labels=torch.arange(4)).loss.backward()
    model(pixels.requires_grad_(), labels=torch.arange(4)).loss.backward()
    assert features.grad is None and not queries[-1].requires_grad
    wrong = r"query: want \[4, 32\], one row.*got \[3, 32\]"
    with pytest.raises(ValueError, match=wrong), patch.query(want[:3]):
        model(**given)
    wrong = "query: want a float tensor"
    with pytest.raises(ValueError, match=wrong), patch.query([1.0]):
        pass


@pytest.mark.filterwarnings("ignore:.*reentrant.*")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_checkpointing_of_two_forwards_recomputes_each_with_its_own_choice(
    method, reentrant, queries
):
    def gradients(checkpointing):
        model, patch, _ = patched("vit", METHODS[method])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        given = images("vit", batch=6)["pixel_values"]
        loss = 0
        for part in given.split(3):
            loss = loss + model(part, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        return [loss, *(p.grad for p in patch.trainable.values())]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)
    assert len(queries) == 4


def test_checkpointing_of_dinov2_is_right_or_refused():
    """Under transformers 5.17 its blocks cannot be told which forward they are recomputed for."""
    model, patch, _ = patched("dinov2", METHODS["l2p"])
    block = patch.anatomy.towers[0].blocks[0].layer
    parameters = inspect.signature(block.forward).parameters.values()
    told = any(p.kind is p.VAR_KEYWORD for p in parameters)
    given, gradients = images("dinov2"), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model.train()(**given, labels=torch.tensor([0, 1, 2, 3])).loss
        if checkpointing and not told:
            with pytest.raises(ValueError, match="want a call from its tower's forward"):
                loss.backward()
            return
        loss.backward()
        gradients.append([p.grad for p in patch.trainable.values()])
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_loss_reaches_a_loop_that_knows_nothing_of_it(method):
    model, patch, _ = patched("vit", METHODS[method])
    with pytest.raises(ValueError, match="want it after a forward"):
        patch.auxiliary_loss()
    given, labels = images("vit"), torch.tensor([0, 1, 2, 3])
    out = model(**given, labels=labels)
    ce = F.cross_entropy(out.logits, labels)
    extra = patch.auxiliary_loss()
    assert extra > 0
    torch.testing.assert_close(out.loss, ce + extra)
    as_tuple = model(**given, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)
    assert torch.equal(model(**given, return_dict=False)[0], out.logits)
    # as Trainer counts: of 16 images in 4 accumulated batches
    part = model(**given, labels=labels, num_items_in_batch=16).loss
    torch.testing.assert_close(part, (ce + extra) / 4)
    with torch.no_grad():
        torch.testing.assert_close(model(**given, labels=labels).loss, ce)
        torch.testing.assert_close(patch.auxiliary_loss() * 1, extra * (method != "coda"))


@pytest.mark.parametrize("method", list(METHODS))
def test_autocast_leaves_choice_weights_and_loss_in_float32(method):
    model, patch, _ = patched("vit", METHODS[method], torch.float32)
    given, losses = dict(images("vit", torch.float32), labels=torch.arange(4)), []
    prompt = patch.pool.prompts[-1]
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            with patch.query(torch.ones(4, 32)):
                loss = model.train()(**given).loss
            rows = prompt.rows(torch.ones(4, 32), 2, 4) if method == "coda" else prompt.tokens
            losses.append((patch.auxiliary_loss().item(), rows))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    loss.backward()
    assert all(p.grad.any() for p in patch.trainable.values())


def test_a_tuple_from_a_tower_that_is_the_whole_model():
    model, _, _ = patched("clip_vision", METHODS["l2p"])
    given = images("clip_vision")
    with torch.no_grad():
        assert torch.equal(model(**given, return_dict=False)[0], model(**given)[0])


def test_a_query_of_zeros_gives_no_nan():
    for method in METHODS.values():
        model, patch, _ = patched("vit", method, torch.float32)
        with patch.query(torch.zeros(2, 32)):
            logits = model(torch.randn(2, 3, 16, 16)).logits
            (logits.sum() + patch.auxiliary_loss()).backward()
        assert all(p.grad.isfinite().all() for p in patch.trainable.values())
