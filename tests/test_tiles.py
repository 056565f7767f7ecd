"""Tiles come from the table, and from a measurement only where that is switched on."""

import pytest
import torch

from fastprompt.ops import prompt_attention_tiles as tiles

triton_testing = pytest.importorskip("triton.testing")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(tiles, "capability", lambda device: 90)
    monkeypatch.setattr(tiles, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    tiles.autotune(False)


def test_the_table_is_asked_by_head_dim_and_queries(hopper):
    def tile(N, d, dtype=torch.float16):
        return tiles.best_tile("fwd", torch.empty(1, 1, N, d, dtype=dtype))

    assert tile(1, 64) == tile(16, 128) != tile(17, 64)
    assert tile(256, 64) != tile(257, 64)
    assert tile(1024, 128) != tile(2048, 128)
    assert tile(256, 64) != tile(256, 64, torch.float32)
    assert all(tile(N, d).queries >= 16 for N in (1, 300) for d in (8, 72, 256))


def test_autotuning_measures_once_and_keeps_the_fastest(hopper, monkeypatch):
    from triton.runtime.errors import OutOfResources

    q, launched = torch.empty(1, 1, 300, 64, dtype=torch.float16), []
    best = tiles._CANDIDATES[5]

    def do_bench(run, **options):
        run()
        return 1.0 if launched[-1] == best else 2.0

    def launch(tile):
        launched.append(tile)
        if tile.queries == 128:
            raise OutOfResources(1, 2, "shared memory")

    monkeypatch.setattr(triton_testing, "do_bench", do_bench)
    assert tiles.best_tile("dq", q, launched.append) == tiles._from_table("dq", q)
    assert len(launched) == 1  # off: no search
    tiles.autotune()
    assert tiles.best_tile("dq", q, launch) == best
    assert len(launched) == 3 + len(tiles._CANDIDATES) and launched[-1] == best
    assert tiles.best_tile("dq", q, launch) == best
    assert len(launched) == 4 + len(tiles._CANDIDATES)
