"""Options of training: one dataclass behind YAML and the command line."""

import argparse
from dataclasses import fields

import pytest

from fastprompt.__main__ import main
from fastprompt.train import TrainConfig, preparing
from fastprompt.train.config import METHODS, add_options, given_options, read_yaml

LEAST = dict(model="m", data=["d.json"], out="o")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return given_options(parser.parse_args(arguments))


def test_the_defaults_are_the_papers_recipe():
    config = TrainConfig(**LEAST)
    assert (config.learning_rate, config.weight_decay, config.warmup) == (7e-4, 0, 0.03)
    assert (config.schedule, config.epochs, config.dtype) == ("cosine", 3, "bfloat16")
    assert (config.method, config.text_tokens, config.vision_tokens) == ("m2pt", 10, 20)


def test_yaml_and_the_command_line_say_the_same(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d.json\nout: o\nlearning_rate: 7e-3\npack: true\nkeep: 4\n")
    config = TrainConfig.load(path)
    assert config.learning_rate == 7e-3  # which YAML takes for a string
    line = "--model m --data d.json --out o --learning-rate 7e-3 --pack --keep 4"
    assert TrainConfig.of(parse(*line.split())) == config
    path.write_text(config.as_yaml())
    assert TrainConfig.load(path) == config


def test_each_option_is_on_the_command_line():
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = {a.dest for a in parser._actions}
    assert {f.name for f in fields(TrainConfig)} <= options
    assert parse() == {}  # what is not given does not hide what YAML says
    assert parse("--no-bucket", "--eval-data", "a", "b") == dict(bucket=False, eval_data=["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learnin_rate=1), "unknown option 'learnin_rate'; did you mean 'learning_rate'"),
        (dict(zzzz=1), "unknown option 'zzzz'; there are model"),
        (dict(method="lorra"), "method: want one of m2pt, .*; got 'lorra'"),
        (dict(method="lora", layers="top"), "layers: method 'lora' has none, .*; got 'top'"),
        (dict(method="full", init="normal"), "init: method 'full' has none"),
        (dict(method="full", visual_prompts="raw"), "visual_prompts: method 'full' has none"),
        (dict(method="projector", train_lm_head=True), "train_lm_head: method 'projector' has"),
        (dict(method="vpt", train_projector=False), "train_projector: method 'vpt' has none"),
        (dict(dtype="int8"), "dtype: want one of bfloat16, float32; got 'int8'"),
        (dict(batch_size=0), "batch_size: want 1 or more, got 0"),
        (dict(batch_size=2.5), "batch_size: want a whole number, got 2.5"),
        (dict(batch_size=True), "batch_size: want a whole number, got True"),
        (dict(learning_rate="fast"), "learning_rate: want a number, got 'fast'"),
        (dict(learning_rate=float("nan")), "learning_rate: want 0 or more"),
        (dict(pack=1), "pack: want true or false, got 1"),
        (dict(data=[]), "data: want at least one"),
        (dict(subset=1.5), "subset: want a share"),
        (dict(projector_lr=-1), "projector_lr: want 0 or more"),
        (dict(model=3), "model: want text, got 3"),
    ],
)
def test_a_wrong_option_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(LEAST | change)


def test_methods_are_made_by_their_names():
    assert preparing._MAKES.keys() == METHODS.keys()
    other = dict(layers="top", init="normal", visual_prompts="raw")
    other |= dict(train_projector=False, train_lm_head=True)
    for method, reads in METHODS.items():
        TrainConfig(**LEAST, method=method, text_tokens=3, **{name: other[name] for name in reads})


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="options: want data, out too"):
        TrainConfig.of(dict(model="m"))


def test_yaml_that_is_none(tmp_path):
    path = tmp_path / "c.yaml"
    for text, message in (("- a", "want a YAML mapping"), ("a: [", "want a YAML file")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(path)
    with pytest.raises(ValueError, match="want a YAML file"):
        read_yaml(tmp_path / "none.yaml")


def test_seeds_are_apart():
    config = TrainConfig(**LEAST, seed=3, order_seed=0)
    assert config.seeds == dict(init=3, order=0, subset=3)


def test_an_unknown_option_of_the_command_line_is_answered(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--visoin-tokens", "4"])
    assert stopped.value.code == 2
    assert "did you mean --vision-tokens?" in capsys.readouterr().err


def test_missing_options_end_with_2(capsys):
    assert main(["train", "--model", "m"]) == 2
    assert "want data, out too" in capsys.readouterr().out
