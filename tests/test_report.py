"""`Patch.report()` as rich and notebooks show it."""

import io
import re

import pytest
import tiny

import fastprompt


@pytest.fixture
def report():
    model = tiny.build("llava")
    return fastprompt.patch(model).report()


def test_rich_prints_a_table_that_leaves_nothing_out(report):
    console = pytest.importorskip("rich.console")
    for shown in (report, fastprompt.reporting.Report("fastprompt: undone [bold]([/x]")):
        out = io.StringIO()
        console.Console(file=out, width=400).print(shown)
        table = out.getvalue()
        words = re.findall(r"[^\s│]+", table)
        assert [w for w in words if not set(w) <= set("─┌┐└┘├┤┬┴┼━┏┓┗┛┡┩╇")] == shown.split()
        assert ("│" in table) == ("\n" in shown)


def test_its_columns(report):
    pytest.importorskip("rich")
    section, label, what = (list(column.cells) for column in report.__rich__().columns)
    assert section[0].plain == "towers" and not label[0].plain and not what[0].plain
    assert label[1].plain == "vision" and what[1].plain.startswith("clip")
    assert not section[1].plain
    (trains,) = (w.plain for s, w in zip(section, what, strict=True) if s.plain == "trains")
    assert trains in report


def test_a_notebook_shows_its_lines(report):
    assert report._repr_html_().count("\n") == report.count("\n")
    assert "<" not in fastprompt.reporting.Report("a<b")._repr_html_()[5:-6]
