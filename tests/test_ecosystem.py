"""A patched model among its neighbours: TRL, Lightning, accelerate, torch.export, device maps."""

import pytest
import tiny
import torch
import zoo

import fastprompt
from fastprompt.methods import VPT, DeepPrompts

P = 3


SEEING = ["vit", "dinov2", "clip_vision", "siglip_vision"]
SEEING += [name for name, row in zoo.ROWS.items() if row.vision and not row.text
           and row.library == "transformers"]  # fmt: skip


def of(name):
    return (zoo if name in zoo.ROWS else tiny).build(name, torch.float32).eval()


def patched(name, method):
    model = of(name)
    patch = fastprompt.patch(model, method)
    torch.manual_seed(0)
    for p in patch.trainable.values():
        p.data.normal_()
    patch.refresh()
    return model, patch


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("name", SEEING)
def test_a_patched_vision_model_is_exported(name, baked):
    model, _ = patched(name, VPT(P))
    given = (zoo if name in zoo.ROWS else tiny).inputs(name, torch.float32)
    if baked:
        fastprompt.bake(model)
    with torch.no_grad():
        program = torch.export.export(model, (), given)
        want = model(**given)
        got = program.module()(**given)
        other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in given.items()}
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(program.module()(**other)[0], model(**other)[0])
        assert not torch.allclose(got[0], of(name)(**given)[0], rtol=1e-3)


def test_a_device_map_of_one_device(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny.build("llama").save_pretrained(tmp_path)
    given = dict(input_ids=torch.arange(3, 9)[None])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    for model in (plain, mapped):
        patch = fastprompt.patch(model, DeepPrompts(text=P))
        torch.manual_seed(0)
        for p in patch.trainable.values():
            p.data.normal_()
        patch.refresh()
    torch.testing.assert_close(mapped(**given).logits, plain(**given).logits)


def test_a_plain_accelerate_loop(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, patch = patched("llama", DeepPrompts(text=P))
    optimizer = torch.optim.AdamW(patch.param_groups(prompt_lr=1e-2))
    accelerator = accelerate.Accelerator(cpu=True)
    ready, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(6, 60, (2, 8))
    losses = []
    for _ in range(5):
        with accelerator.accumulate(ready):
            loss = ready.train()(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fastprompt.save(accelerator.unwrap_model(ready), tmp_path)
    fresh = tiny.build("llama").eval()
    fastprompt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(input_ids=ids).logits, ready.eval()(input_ids=ids).logits)


def test_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Tuned(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.patch = patched("llama", DeepPrompts(text=P))

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.patch.param_groups(prompt_lr=1e-2))

    module = Tuned()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(6, 60, (4, 8)), batch_size=2))
    moved = {name for name, p in module.model.named_parameters() if not p.equal(before[name])}
    assert moved == set(module.patch.trainable)


def test_trls_trainer(tmp_path):
    """Rows that are tokens already: its collator and its loss are what it adds to Trainer."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model, patch = patched("llama", DeepPrompts(text=P))
    rows = torch.randint(6, 60, (8, 10)).tolist()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    words = {f"w{i}": i for i in range(64)}
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0",
        eos_token="w2", unk_token="w0",
    )  # fmt: skip
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        dataset_kwargs=dict(skip_prepare_dataset=True), remove_unused_columns=False,
    )  # fmt: skip
    # a fingerprint of one's own: datasets' hash of everything fails beside some versions of pandas
    table = datasets.table.InMemoryTable.from_pydict(dict(input_ids=rows))
    data = datasets.Dataset(table, fingerprint="rows")
    trainer = trl.SFTTrainer(
        model, args, train_dataset=data,
        processing_class=tokens,
    )  # fmt: skip
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == set(patch.trainable)
