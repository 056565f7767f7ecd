"""`benchmarks.fp8_error`, narrow; its part on the demo's model needs downloads."""

import json

import pytest

pytest.importorskip("bitsandbytes")


def test_gradients_are_worse_than_bfloat16s(tmp_path, capsys):
    from benchmarks import fp8_error

    file = tmp_path / "errors.json"
    file.write_text('{"curve": 1}')
    arguments = ["--quick", "--steps", "0", "--device", "cpu", "--json", str(file)]
    assert fp8_error.main(arguments) == 0
    record = json.loads(file.read_text())
    assert record["curve"] == 1  # what was there stays
    errors = record["gradients"]["errors"]
    for what in ("input", "prompts 0", "prompts 1"):
        base, e4m3, e5m2 = (row[what] for row in errors.values())
        assert 0 < 4 * base < e4m3 < e5m2 < 0.5
    assert "e5m2" in capsys.readouterr().out
