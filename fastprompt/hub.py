"""Prompts on the Hugging Face hub, and the card beside them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from fastprompt.patching import Patch

README = "README.md"


def push_to_hub(
    model: nn.Module,
    repo: str | Path,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload prompts with fastprompt",
) -> str:
    """Write what `fastprompt.save` writes, with its card, to a repository of the hub.

    Args:
        model: a patched model.
        repo: "user/name", made if it is not there; or a local folder (a Path, or one that exists),
            which is written to instead.
        private, token: as huggingface_hub has them.

    Returns:
        The commit's address; of a folder, its path.

    Raises:
        ValueError: the model is not patched. What huggingface_hub raises where it is not reached.
    """
    from fastprompt.checkpoint import save

    if isinstance(repo, Path) or Path(repo).is_dir():
        return str(save(model, repo).parent)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)  # before anything is made there
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message)
        )


def from_hub(
    model: nn.Module,
    repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Patch:
    """`fastprompt.load` from a repository of the hub, or from a local folder.

    Args:
        model: the same base model as when they were saved, dense or 4-bit.
        repo: "user/name", or a local folder.
        revision: a branch, a tag or a commit; token: as huggingface_hub has it.

    Raises:
        ValueError: what `fastprompt.load` refuses. What huggingface_hub raises where the repository
            is not reached and not in its cache.
    """
    from fastprompt.checkpoint import CARD, WEIGHTS, load

    if not Path(repo).exists():
        from huggingface_hub import snapshot_download

        repo = snapshot_download(
            str(repo), revision=revision, token=token, allow_patterns=[WEIGHTS, CARD]
        )
    return load(model, repo)


def model_card(card: dict) -> str:
    """README.md of a checkpoint, for people and for the hub, from its card."""
    from huggingface_hub import ModelCardData

    base, method = card["base"], card["method"]
    parts = base["name"].split("/")  # of the hub: two; of a folder: an empty first one, or others
    hub = base["name"] if len(parts) == 2 and all(parts) else None
    data = ModelCardData(
        library_name="fastprompt", base_model=hub, tags=["prompt-tuning", method["name"].lower()]
    )
    options = ", ".join(f"{k}={v!r}" for k, v in method.items() if k != "name")
    numbers = sum(_count(each["shape"]) for each in card["tensors"].values())
    name = base["name"] or f"the {base['class']} it was trained on"
    return f"""---
{data.to_yaml()}
---

# Prompts for {name}

`{method["name"]}({options})`: {numbers:,} numbers in {len(card["tensors"])} tensors, trained
and saved with fastprompt {card["fastprompt"]}. They fit {base["class"]} (`{base["model_type"]}`)
with the weights that they were trained on, dense or 4-bit, and no other: loading checks a few of
its numbers.

```python
import fastprompt

model = ...  # {name}
patch = fastprompt.from_hub(model, "this repository, or a folder")
```
"""


def _count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
