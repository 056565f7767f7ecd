"""What docs/loops.md shows runs as it stands there."""

import re
from importlib.util import find_spec
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
    if torch.cuda.is_available():
        pytest.skip("libraries would move the model to the card, and the page's batches are not")
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
        first=dict(input_ids=ids[:4], labels=ids[:4]),
        tokenizer=tokenizer(),
    )
    if find_spec("datasets"):
        from datasets import Dataset

        given["texts"] = Dataset.from_dict(dict(text=texts))
    losses, wanted = [], []
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        wanted.append(re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))
        if all(map(find_spec, wanted[-1])):
            exec(compile(block, PAGE.name, "exec"), given)
            losses.append(given["model"](**given["first"]).loss.item())
    assert losses[-1] < losses[0] and len({*losses}) == len(losses)  # each block trains
    assert [w[0] for w in wanted if w] == [
        *("fastprompt", "transformers", "trl", "lightning", "accelerate", "torch"),
    ]
    frozen = {k: v for k, v in model.named_parameters() if k in start}
    for name, p in frozen.items():  # FSDP2 leaves some whole after a forward
        assert torch.equal(getattr(p, "full_tensor", lambda p=p: p)(), start[name]), name
    if find_spec("lightning"):
        _lightning_checkpoint(given, tmp_path)
    fresh = tiny.build("llama")
    fastprompt.load(fresh, tmp_path / "shards")
    again = fresh(**given["first"]).loss.item()
    assert again == pytest.approx(losses[-1], rel=1e-5)


def _lightning_checkpoint(given, folder):
    """It holds what trains, and fills another model."""
    [checkpoint] = (folder / "checkpoints").glob("*.ckpt")
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert held.keys() == {f"model.{name}" for name in given["patch"].trainable}
    other = tiny.build("llama")
    fastprompt.patch(other, given["patch"].method)
    given["Tuned"].load_from_checkpoint(checkpoint, model=other, strict=False)
    for name, p in fastprompt.patch_of(other).trainable.items():
        assert torch.equal(p, held[f"model.{name}"])
