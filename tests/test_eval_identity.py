"""What tells one model from another: prompts that are seen just now, and 4-bit weights."""

from contextlib import nullcontext
from functools import partial

import benchmark_files as files
import pytest

import fastprompt
from fastprompt.eval import InputError, evaluate
from fastprompt.eval.identity import identity
from fastprompt.eval.loading import load_model
from fastprompt.methods import M2PT


def test_predictions_are_of_the_prompts_that_were_seen(tmp_path):
    files.everything(tmp_path / "data")
    model, processor = files.llava(), files.processor()
    patch = fastprompt.patch(model, M2PT(2, 2, train_projector=False))  # no other parts change
    patch.add("a")
    patch.add("b")
    states = {
        "default": nullcontext,
        "a": partial(patch.using, "a"),
        "b": partial(patch.using, "b"),
        "mixed": partial(patch.using, ["a", "b"]),
        "other way round": partial(patch.using, ["b", "a"]),
        "none": patch.disabled,
    }
    found = {}
    for name, state in states.items():
        with state():
            found[name] = identity(model, processor)["weights"]
            assert identity(model, processor)["weights"] == found[name]
    assert len(set(found.values())) == len(states)
    assert identity(model, processor)["weights"] == found["default"]
    args = (model, processor, ["vsr"], tmp_path / "data", tmp_path / "out")
    with patch.using("a"):
        evaluate(*args)
    for state in (partial(patch.using, "b"), patch.disabled):
        with state(), pytest.raises(InputError, match="but what lies there is of"):
            evaluate(*args)


def test_a_4_bit_model_is_told_by_its_packed_weights_and_their_scales(tmp_path):
    files.save_model(tmp_path)

    def told(change):
        model, processor = load_model(tmp_path, four_bit=True)
        weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
        change(weights[0])
        return identity(model, processor)["weights"]

    changes = (
        lambda weight: None,
        lambda weight: weight.data.add_(1),
        lambda weight: weight.quant_state.absmax.add_(1),
        lambda weight: weight.quant_state.state2.absmax.mul_(2),
    )
    assert len(set(map(told, changes))) == len(changes)
    assert told(changes[0]) == told(changes[0])
