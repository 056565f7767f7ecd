"""The hub, a local folder in its place, the model card; and baked prompts."""

import copy
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch
import yaml
import zoo
from test_exactness import relative

import fastprompt
from fastprompt.methods import E2VPT, L2P, M2PT, VPT, DeepPrompts, PrefixTuning

P = 3


def patched(name, method, dtype=torch.float32):
    model = (tiny.build(name) if name not in zoo.ROWS else zoo.build(name)).to(dtype).eval()
    patch = fastprompt.patch(model, method)
    torch.manual_seed(0)
    for p in patch.trainable.values():
        p.data.normal_()
    patch.refresh()
    return model, patch


# ---- the hub ----


class Api:
    """Keeps what is uploaded in a folder."""

    def __init__(self, store):
        self.store, self.asked = store, []

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo, private, exist_ok):
        self.asked.append((repo, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo}" if "/" not in repo else repo)

    def upload_folder(self, repo_id, folder_path, commit_message):
        import shutil

        shutil.copytree(folder_path, self.store / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo, revision, token, allow_patterns):
        self.asked.append((repo, revision, token))
        assert set(allow_patterns) == {"prompts.safetensors", "card.json"}
        return str(self.store / repo)


@pytest.fixture
def api(tmp_path, monkeypatch):
    api = Api(tmp_path / "store")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", api.snapshot_download)
    return api


def test_prompts_go_to_the_hub_and_come_back(api):
    model, _ = patched("llama", DeepPrompts(text=P))
    given = tiny.inputs("llama")
    address = fastprompt.push_to_hub(model, "someone/prompts", private=True, token="t")
    assert address == "https://hub/someone/prompts/commit/1"
    assert api.asked == [("token", "t"), ("someone/prompts", True, True)]
    fresh = tiny.build("llama").eval()
    fastprompt.from_hub(fresh, "someone/prompts", revision="v1")
    assert api.asked[-1] == ("someone/prompts", "v1", None)
    assert torch.equal(fresh(**given).logits, model(**given).logits)
    with pytest.raises(ValueError, match="patch"):
        fastprompt.push_to_hub(tiny.build("llama"), "someone/else")
    assert not (api.store / "someone/else").exists() and len(api.asked) == 3


def test_a_folder_is_a_hub_too(api, tmp_path):
    model, _ = patched("llama", DeepPrompts(text=P))
    folder = tmp_path / "here"
    assert fastprompt.push_to_hub(model, folder) == str(folder)
    fresh = tiny.build("llama").eval()
    fastprompt.from_hub(fresh, str(folder))
    given = tiny.inputs("llama")
    assert torch.equal(fresh(**given).logits, model(**given).logits) and not api.asked


def test_the_model_card_is_read_by_people_and_by_the_hub(tmp_path):
    model, _ = patched("llama", DeepPrompts(text=P))
    model.config._name_or_path = "someone/tiny-llama"
    fastprompt.save(model, tmp_path)
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["library_name"] == "fastprompt" and said["base_model"] == "someone/tiny-llama"
    assert "deepprompts" in said["tags"] and "text=3" in text
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} numbers" in text
    (tmp_path / "README.md").write_text("mine")
    fastprompt.save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.config._name_or_path = "/a/local/folder"
    fastprompt.save(model, tmp_path / "b")
    assert "base_model" not in (tmp_path / "b" / "README.md").read_text().split("---\n")[1]


# ---- bake ----


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", DeepPrompts(text=P)),
        ("qwen3", DeepPrompts(text=P)),
        ("phi3", PrefixTuning(P)),
        ("llama", PrefixTuning(P, mlp=4)),
        ("gpt2", DeepPrompts(text=P)),
        ("t5", DeepPrompts(text=P)),
        ("vit", VPT(P)),
        ("vit", E2VPT(P)),
        ("llava", M2PT(P, P)),
        ("swin", VPT(P)),
        ("qwen2_5_vl", M2PT(P, P)),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_baked_prompts_give_the_same_and_compute_no_projection(name, method):
    given = tiny.inputs(name) if name not in zoo.ROWS else zoo.inputs(name, torch.float32)
    model, patch = patched(name, method)
    base = copy.deepcopy(model)
    fastprompt.patch_of(base).undo()
    want = tiny.output(name, model, given)
    assert fastprompt.bake(model) is patch and patch.baked
    assert relative(tiny.output(name, model, given), want) < 1e-5
    assert not any("fastprompt" in n for n in patch.trainable)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "fastprompt" in n)
    model.train()
    for prompt in patch.prompts.values():
        assert type(prompt).__name__ == "KeyValues" and not prompt.tokens.requires_grad
    model.eval()
    with pytest.raises(ValueError, match="want prompts as they were trained, got baked ones"):
        fastprompt.save(model, "never-written")
    patch.undo()
    assert relative(tiny.output(name, model, given), tiny.output(name, base, given)) < 1e-6


@pytest.mark.parametrize("method", [L2P(), VPT(P, deep=False)], ids=["pool", "tokens"])
def test_what_cannot_be_baked(method):
    model, patch = patched("vit", method)
    before = list(patch.prompts.values())
    with pytest.raises(ValueError, match="bake: want prompts as side keys, of every sample, got"):
        fastprompt.bake(model)
    assert list(patch.prompts.values()) == before and not patch.baked


def test_prompts_that_the_projector_sees_are_not_baked():
    model, _ = patched("llava", M2PT(P, P, visual_prompts="context"))
    with pytest.raises(ValueError, match="bake: want"):
        fastprompt.bake(model)
    assert not fastprompt.patch_of(model).baked
