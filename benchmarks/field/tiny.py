"""The tiny task: a Llama of four small layers that was taught to answer with one of six letters.

A row is ``begin, which, six letters, ask, answer``. In its own training ``which`` says the letter's
place. In the task it is a word that the model never saw, and the place is always the same: prompts
have to say it instead. (A random model would not do: what can be tuned out of one is luck.)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.field.tasks import IGNORE, Batch, Task

PLACES, LETTERS, ROWS = 6, 16, 32  # rows of a batch
PAD, BEGIN, END, ASK, UNKNOWN = range(5)
WHICH, LETTER = 8, 32  # the first of each kind of token
ANSWER = 3  # the task's place
TAUGHT = 600  # steps that the model is taught for

CONFIG = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=PAD,
    bos_token_id=BEGIN,
    eos_token_id=END,
)


def prepare(folder: Path, steps: int, taught: int = TAUGHT) -> Task:
    """Make the model and the task of so many steps; the same numbers at every call."""
    _taught_model(taught).save_pretrained(folder / "tiny")
    generator = torch.Generator().manual_seed(1)
    batches = [_task_rows(generator) for _ in range(steps)]
    watched = [_task_rows(generator) for _ in range(2)]
    exam = [_task_rows(generator) for _ in range(16)]
    start = dict(input_ids=watched[0]["input_ids"][0])
    return Task("tiny", str(folder / "tiny"), False, batches, watched, exam, start=start)


def _taught_model(steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model, generator = LlamaForCausalLM(LlamaConfig(**CONFIG)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        place = torch.randint(PLACES, (4 * ROWS,), generator=generator)
        ids = _rows(WHICH + place, place, generator)
        loss = F.cross_entropy(model(input_ids=ids[:, :-1]).logits[:, -1], ids[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _task_rows(generator: torch.Generator) -> Batch:
    place = torch.full((ROWS,), ANSWER)
    ids = _rows(torch.full((ROWS,), UNKNOWN), place, generator)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = ids[:, -1]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def _rows(which: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
    n = len(which)
    letters = LETTER + torch.randint(LETTERS, (n, PLACES), generator=generator)
    begin, ask = torch.full((n, 1), BEGIN), torch.full((n, 1), ASK)
    return torch.cat([begin, which[:, None], letters, ask, letters.gather(1, place[:, None])], 1)
