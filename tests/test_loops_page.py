"""What docs/loops.md shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import fastprompt

PAGE = Path(__file__).parent.parent / "docs" / "loops.md"


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tokenizer():
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0"
    )


def test_the_page(tmp_path, one_process):
    datasets = pytest.importorskip("datasets")
    for library in ("trl", "lightning", "accelerate"):
        pytest.importorskip(library)
    torch.manual_seed(0)
    ids = torch.randint(6, 60, (8, 10))
    rows = [dict(input_ids=row, labels=row) for row in ids]
    texts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    model = tiny.build("llama")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = dict(
        torch=torch,
        model=model,
        folder=tmp_path,
        rows=rows,
        loader=DataLoader(rows, batch_size=2),
        batches=list(DataLoader(rows, batch_size=4)),
        tokenizer=tokenizer(),
        texts=datasets.Dataset.from_dict(dict(text=texts)),
    )
    losses = []
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), given)
        losses.append(given["model"](**given["batches"][0]).loss.item())
    assert losses[-1] < losses[0] and len({*losses}) == len(losses) == 6  # each block trains

    frozen = {k: v for k, v in model.named_parameters() if k in start}
    for name, p in frozen.items():  # FSDP2 leaves some whole after a forward
        assert torch.equal(getattr(p, "full_tensor", lambda p=p: p)(), start[name]), name
    [checkpoint] = (tmp_path / "checkpoints").glob("*.ckpt")
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert held.keys() == {f"model.{name}" for name in given["patch"].trainable}
    other = tiny.build("llama")
    fastprompt.patch(other, given["patch"].method)
    given["Tuned"].load_from_checkpoint(checkpoint, model=other, strict=False)
    for name, p in fastprompt.patch_of(other).trainable.items():
        assert torch.equal(p, held[f"model.{name}"])
    fresh = tiny.build("llama")
    fastprompt.load(fresh, tmp_path / "shards")
    again = fresh(**given["batches"][0], return_dict=True).loss.item()
    assert again == pytest.approx(losses[-1], rel=1e-5)
