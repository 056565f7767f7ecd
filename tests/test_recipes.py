"""Training recipes: each is whole, and runs on a tiny model, assembled as they want theirs."""

from pathlib import Path

import conversations
import pytest
import tiny
import torch
import transformers as tf

from fastprompt.__main__ import main
from fastprompt.demo.zero_shot import prepare
from fastprompt.sweep.plan import read_plan
from fastprompt.train import TrainConfig

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("m2pt-*.yaml"))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """A tiny CLIP and a tiny Llama, assembled by the command line; and stage 1 of it."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tf.CLIPVisionModel(tiny.VISION_CONFIGS["clip"]()).save_pretrained(root / "clip")
    conversations.processor().image_processor.save_pretrained(root / "clip")
    size = dict(vocab_size=272, max_position_embeddings=512, pad_token_id=3)
    tf.LlamaForCausalLM(tf.LlamaConfig(**tiny.TEXT | size)).save_pretrained(root / "llama")
    conversations.tokenizer(chat_template=None).save_pretrained(root / "llama")
    command = ["assemble", str(root / "clip"), str(root / "llama"), "--out", str(root / "model")]
    assert main(command) == 0
    assert main(command) == 2  # there is something in it now
    return root


def test_parts_that_do_not_fit(assembled, capsys):
    command = ["assemble", str(assembled / "llama"), str(assembled / "llama")]
    assert main([*command, "--out", str(assembled / "x")]) == 2
    assert "error: vision: want an encoder of" in capsys.readouterr().out
    assert not (assembled / "x").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_whole(path):
    TrainConfig.load(path)
    head = path.read_text().split("model:")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert [line.split(":")[0] for line in head[-2:]] == ["# published", "# ours"]


def test_the_zero_shot_runs_are_whole(tmp_path, monkeypatch):
    """Where `prepare` wrote its files: the plans' paths are relative to there."""
    for name in ("seen", "watched", *(f"families-{n}" for n in prepare.CURVE)):
        (tmp_path / f"{name}.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    stage1 = TrainConfig.load(FOLDER / "zero-shot-stage1.yaml")
    counts = {"": 6, "-families": 4, "-methods": 21, "-ablations": 9, "-lengths": 9}
    for name, count in counts.items():
        runs = read_plan(FOLDER / f"zero-shot{name}.yaml", tmp_path / "runs").runs
        assert len(runs) == count
        for run in runs:
            assert run.config.projector == f"{stage1.out}/prompts"
            assert all(Path(file).is_file() for file in run.config.data)


def test_the_paper_and_the_script():
    paper, script = (TrainConfig.load(FOLDER / f"m2pt-{n}.yaml") for n in ("paper", "script"))
    assert (paper.vision_tokens, paper.text_tokens, paper.train_lm_head) == (20, 10, False)
    assert (script.vision_tokens, script.text_tokens, script.train_lm_head) == (10, 10, True)
    assert script.visual_prompts == "raw"


def test_recipes_run(assembled, shared, capsys):
    small = ["--data", str(shared / "data.jsonl"), "--image-folder", str(shared)]
    small += ["--dtype", "float32", "--workers", "0", "--accumulate", "1"]
    model, out = str(assembled / "model"), assembled / "stage1"

    def train(name, *more):
        code = main(["train", "--config", str(FOLDER / f"m2pt-{name}.yaml"), *small, *more])
        said = capsys.readouterr().out
        assert code == 0, said
        return said

    train("stage1", "--model", model, "--out", str(out), "--max-steps", "2")
    stage1 = ["--model", model, "--projector", str(out / "prompts")]
    for name in ("paper", "script", "script-20"):
        said = train(name, *stage1, "--dry-run")
        assert "USER: <image>×" in said and "</s>⟧" in said
        assert ("lm_head, trains" in said) == name.startswith("script")
    run = assembled / "paper"
    train("paper", *stage1, "--out", str(run), "--max-steps", "1")
    assert (run / "prompts").is_dir()
    said = train("llava-1.5", "--model", str(shared / "model"), "--no-four-bit", "--dry-run")
    assert "multi_modal_projector" in said
