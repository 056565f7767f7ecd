"""Tables of finished runs: what is read, merged, refused, picked, drawn."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from runs import config_of, train

from fastprompt.__main__ import main
from fastprompt.sweep import (
    MixedRuns,
    Record,
    check_mixed,
    pick,
    read_records,
    summarise,
    write_results,
)
from fastprompt.sweep.plots import draw, shown, varying
from fastprompt.sweep.records import MEAN


def record(name="a", seed=0, scores=None, asked=None, **options):
    options = dict(out=f"o/{name}", model="m", learning_rate=1e-3, layers="all") | options
    return Record(
        name, seed, options, dict(train="abc"), [1.0, 2.0], asked or {}, 5, 1000, 10.0, 2**30,
        dict(loss=1.0, accuracy=0.5) if scores is None else scores, "cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """``a/seed-0``, ``a/seed-1`` and ``b``, trained."""
    folder = tmp_path_factory.mktemp("finished")
    for name, seed, method in (("a/seed-0", 0, "m2pt"), ("a/seed-1", 1, "m2pt"), ("b", 7, "text")):
        more = dict(method=method, seed=seed, max_steps=2, hold_out=6)
        train(config_of(shared, folder / name, **more))
    return folder


def evaluated(folder, model=None, digest="d", **counts):
    tasks = {name: dict(count=n, digest=digest, headline=0.25 * (i + 1)) for i, (name, n) in
             enumerate(counts.items())}  # fmt: skip
    run = dict(score="exact", suffix="", max_new_tokens=16, model=model or {})
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "results.json").write_text(json.dumps(dict(run=run, tasks=tasks)))


def test_records_are_of_their_folders(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    evaluated(tmp_path / "x" / "b", vsr=10, pope=20, mnist=5)
    records = read_records([tmp_path / "x"])
    assert [(r.name, r.seed) for r in records] == [("a", 0), ("a", 1), ("b", 7)]
    said = json.loads((finished / "b" / "result.json").read_text())
    b = records[2]
    assert (b.trainable, b.seconds, b.memory) == tuple(
        said[k] for k in ("trainable", "seconds", "memory")
    )
    own = dict(vsr=0.25, pope=0.5, mnist=0.75)
    assert b.scores == said["held_out"] | own | {MEAN: 0.5}
    assert b.tasks == ["vsr", "pope", "mnist"] and b.data["hold_out"] == 6
    assert b.options["method"] == "text" and len(b.data["train"]) == 64


def test_a_rerun_is_no_run_of_its_sweep(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    again = tmp_path / "x" / "a" / "seed-0-rerun"
    shutil.copytree(finished / "a" / "seed-0", again)
    run = json.loads((again / "run.json").read_text())
    assert run["again"] is None
    (again / "run.json").write_text(json.dumps(run | {"again": "seed-0"}))
    assert [r.label for r in read_records([tmp_path / "x"])] == ["a seed 0", "a seed 1", "b seed 7"]
    assert [r.name for r in read_records([again])] == ["seed-0-rerun"]


def test_merging_folders_and_files(finished, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(finished / name, tmp_path / f"machine-{name}" / name)
    one = str(tmp_path / "one")
    assert main(["results", "merge", str(tmp_path / "machine-a"), "--out", one]) == 0
    both = [f"{one}/results.json", str(tmp_path / "machine-b")]
    capsys.readouterr()
    assert main(["results", "merge", *both, "--out", str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "| a | 2 |" in said and "| b | 1 |" in said
    whole = json.loads((tmp_path / "two" / "results.json").read_text())
    assert whole["runs"] == json.loads(json.dumps([vars(r) for r in read_records([finished])]))
    assert (tmp_path / "two" / "results.md").read_text().startswith("| run | seeds | trains |")
    assert main(["results", "show", str(tmp_path / "machine-b")]) == 0
    assert (tmp_path / "machine-b" / "results.md").is_file()


def test_mixed_data_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "b", tmp_path / "b")
    path = tmp_path / "b" / "run.json"
    path.write_text(path.read_text().replace('"train": "', '"train": "0'))
    out = ["--out", str(tmp_path / "out")]
    assert main(["results", "merge", str(finished), str(tmp_path / "b"), *out]) == 2
    assert "a seed 0 and b seed 7: want the same data, got train" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(data=dict(train="abd")), "want the same data, got train abc and train abd"),
        (dict(base=[1.0, 2.5]), "want the same frozen model, got m and m"),
        (dict(asked=dict(questions=dict(vsr=4))), "want the same questions"),
        (dict(name="a"), "a seed 0 is there twice: in o/a and o/b"),
    ],
)
def test_what_no_table_may_hold(other, words):
    asked = dict(questions=dict(vsr=5))
    first, none, second = record(asked=asked), record("c"), record("b", asked=asked)
    check_mixed([none, first, second])
    with pytest.raises(MixedRuns, match=words):
        check_mixed([none, first, replace(second, **other)])


def test_runs_that_were_asked_otherwise_are_refused(finished, tmp_path):
    """Other questions under one name, as many of them; the same in another template of the plan."""
    for n, other in enumerate((dict(digest="e"), dict(model={"chat_template sha256": "f"}))):
        folder = tmp_path / str(n)
        shutil.copytree(finished, folder)
        for name in ("a/seed-0", "a/seed-1", "b"):
            evaluated(folder / name, own=10)
        assert read_records([folder])
        evaluated(folder / "b", **other, own=10)
        with pytest.raises(MixedRuns, match="want the same questions"):
            read_records([folder])


def test_what_is_no_run(finished, tmp_path):
    with pytest.raises(ValueError, match="want a folder with finished runs, found none"):
        read_records([tmp_path])
    (tmp_path / "r.json").write_text('{"runs": [{"name": "a"}]}')
    with pytest.raises(ValueError, match=r"want a results\.json of"):
        read_records([tmp_path / "r.json"])
    shutil.copytree(finished / "b", tmp_path / "b")
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="want a finished run, whole"):
        read_records([tmp_path / "b"])


# ---- the table ----


def test_mean_and_deviation_over_seeds():
    runs = [record("a", s, dict(loss=x, accuracy=0.5)) for s, x in enumerate((1.0, 2.0, 4.0))]
    runs.append(record("b", 0, dict(loss=3.0)))
    a, b = summarise(runs)
    assert a.seeds == [0, 1, 2] and a.stats["loss"].mean == pytest.approx(7 / 3)
    assert a.stats["loss"].sd == pytest.approx((7 / 3) ** 0.5)  # of a sample: n - 1
    assert b.stats["loss"] == (3.0, None) and "accuracy" not in b.stats
    assert a.stats["share"].mean == 0.005


def test_the_markdown(tmp_path):
    asked = dict(questions=dict(vsr=4))
    runs = [
        record("a", 0, dict(loss=1.0, accuracy=0.5, vsr=0.25), asked),
        record("a", 1, dict(loss=2.0, accuracy=0.5, vsr=0.75), asked),
        replace(record("b", 0, dict(loss=3.0, accuracy=0.125)), machine="a card"),
    ]
    said = write_results(tmp_path, runs).splitlines()
    assert said[0] == (
        "| run | seeds | trains | share | memory | time | held-out loss | held-out accuracy | vsr |"
    )
    assert said[2] == (
        "| a | 2 | 5 | 0.500% ± 0.000% | 1.00 GB ± 0.00 GB | 10.0 s ± 0.0 s | 1.5000 ± 0.7071 | "
        "50.0% ± 0.0% | 50.0% ± 35.4% |"
    )
    assert said[3] == "| b | 1 | 5 | 0.500% | 1.00 GB | 10.0 s | 3.0000 | 12.5% | – |"
    assert "Time and memory are of different machines: a card, cpu." in said


def test_the_best_of_what_was_tried(tmp_path):
    def tried(name, rate, *losses, accuracy=0.5):
        name = f"{name},learning_rate={rate}".strip(",")
        scores = [dict(loss=loss, accuracy=accuracy) for loss in losses]
        return [record(name, s, x, learning_rate=rate) for s, x in enumerate(scores)]

    runs = [*tried("a", 0.1, 1.0, 4.0), *tried("a", 0.2, 2.0, 2.0, accuracy=0.1)]
    runs += [*tried("b", 0.1, 3.0), *tried("b", 0.2, 5.0, accuracy=0.9), *tried("", 0.3, 9.0)]
    rows = summarise(pick(runs, "learning_rate"))
    assert [(r.name, r.options["learning_rate"]) for r in rows] == [
        ("a", 0.2), ("b", 0.1), ("learning_rate=0.3", 0.3),
    ]  # fmt: skip
    some = [record(f"x,layers={v},subset=1", 0, layers=v) for v in ("first", "0,2")]
    assert [r.name for r in pick(some, "layers")] == ["x,subset=1"]
    rows = summarise(pick(runs, "learning_rate", "accuracy"))
    assert [r.options["learning_rate"] for r in rows] == [0.1, 0.2, 0.3]
    said = write_results(tmp_path, runs, tune="learning_rate")
    assert "| a | 2 | 0.2 | 5 |" in said
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == len(runs)
    with pytest.raises(ValueError, match=r"want loss or accuracy of held-out rows; .* no 'vsr'"):
        pick(runs, "learning_rate", "vsr")
    with pytest.raises(ValueError, match="want an option of training, got 'lr'"):
        pick(runs, "lr")


def tried_at(rate, losses):
    name = f"a,learning_rate={rate}"
    return [record(name, s, dict(loss=x), learning_rate=rate) for s, x in losses.items()]


def test_what_was_tried_is_compared_over_the_same_seeds():
    runs = [*tried_at(0.1, {0: 1.0, 1: 1.0, 2: 9.0}), *tried_at(0.2, {0: 2.0, 1: 2.0})]
    (row,) = summarise(pick(runs, "learning_rate"))
    assert row.options["learning_rate"] == 0.1 and row.seeds == [0, 1, 2]
    with pytest.raises(ValueError, match="want a tried with the same seeds, got 0; 1"):
        pick([*tried_at(0.1, {0: 1.0}), *tried_at(0.2, {1: 1.0})], "learning_rate")


def test_losses_that_are_not_finite(finished, tmp_path):
    runs = [*tried_at(0.1, {0: None, 1: 0.1}), *tried_at(0.2, {0: 2.0, 1: 2.0})]
    (row,) = summarise(pick(runs, "learning_rate"))
    assert row.options["learning_rate"] == 0.2 and row.stats["loss"].mean == 2.0
    (row,) = summarise(pick(tried_at(0.1, {0: None}), "learning_rate"))
    assert "loss" not in row.stats
    shutil.copytree(finished, tmp_path / "x")  # as a run writes it
    path = tmp_path / "x" / "b" / "result.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | dict(held_out=dict(loss=None, accuracy=0.0))))
    said = write_results(tmp_path / "out", read_records([tmp_path / "x"])).splitlines()
    assert [line.endswith("| – | 0.0% |") for line in said[2:4]] == [False, True]


# ---- pictures ----


def names(paths):
    return [path.name for path in paths]


def test_a_line_along_one_option(tmp_path):
    runs = [record(f"r{v}", s, dict(accuracy=v), subset=v) for v in (1.0, 0.25) for s in (0, 1)]
    rows = summarise(runs)
    assert varying(rows) == ["subset"] and shown(rows) == "accuracy"
    assert names(draw(rows, tmp_path)) == ["line.png"]
    Image.open(tmp_path / "line.png").verify()
    rows = summarise([record(layers, layers=layers) for layers in ("first", "all")])
    assert names(draw(rows, tmp_path)) == ["line.png"]


def test_a_heat_map_of_two(tmp_path, monkeypatch):
    import matplotlib.axes

    shown_ = []
    real = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(
        matplotlib.axes.Axes, "imshow", lambda s, x, **k: (shown_.append(x), real(s, x, **k))[1]
    )
    runs = [
        record(f"{t},{v}", 0, dict(accuracy=t + v / 100), text_tokens=t, vision_tokens=v)
        for t in (10, 5) for v in (20, 0, 5) if (t, v) != (5, 5)
    ]  # fmt: skip
    rows = summarise(runs)
    assert names(draw(rows, tmp_path)) == ["heatmap.png"]
    Image.open(tmp_path / "heatmap.png").verify()
    (grid,) = shown_
    assert grid[0].tolist()[::2] == [5.0, 5.2] and grid[1].tolist() == [10.0, 10.05, 10.2]
    assert grid[0, 1] != grid[0, 1]  # nothing there
    few = [row for row in rows if row.name in ("10,20", "5,0")]
    few += summarise([record("x", 0, dict(accuracy=1), text_tokens=7, vision_tokens=1)])
    assert draw(few, tmp_path) == []


def test_a_radar_of_tasks(tmp_path):
    asked = dict(questions=dict(vsr=4, pope=4, mnist=4))
    scores = {"vsr": 0.1, "pope": 0.2, "mnist": 0.3, MEAN: 0.2, "loss": 2.0}
    runs = [record(n, 0, scores, asked, method=n, layers=n) for n in ("m2pt", "vpt")]
    assert names(draw(summarise(runs), tmp_path)) == ["radar.png", "heatmap.png"]
    assert shown(summarise(runs)) == MEAN
    only = [record(n, 0, scores, asked) for n in ("m2pt", "vpt")]
    assert names(draw(summarise(only), tmp_path)) == ["radar.png"]
    without = [record("m2pt", 0, scores, asked), record("vpt")]
    assert draw(summarise(without), tmp_path) == []
