"""Files that are damaged as a whole: arrays, tar shards, folders. What is left trains; all of what
is lost is said."""

import json

import conversations
import pytest
from test_train_rows import ASK, TELL, checked, conversation

# ---- arrays ----


def by_lines(made):
    return "[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n"


WRITERS = {
    "indented": lambda made: json.dumps(made, indent=2),
    "flat": lambda made: json.dumps(made, indent=0),
    "lines": by_lines,
    "lines from the first": lambda made: by_lines(made).replace("[\n{", "[{", 1),
    "windows": lambda made: by_lines(made).replace("\n", "\r\n"),
}


def cut(text, at, insert="", length=1):
    return text[:at] + insert + text[at + length :]


# (text, where the row's id stands, where the next one's) -> text
DAMAGES = {
    "no }": lambda text, at, after: cut(text, text.rindex("}", at, after)),
    "no ]": lambda text, at, after: cut(text, text.rindex("]", at, after)),
    "no {": lambda text, at, after: cut(text, text.rindex("{", 0, at)),
    "no [": lambda text, at, after: cut(text, text.index("[", at)),
    "no first quote": lambda text, at, after: cut(text, at),
    "no later quote": lambda text, at, after: cut(text, text.rindex('"', at, after - 20)),
    "one [ more": lambda text, at, after: cut(text, text.rindex("{", 0, at), "[{"),
    "one } more": lambda text, at, after: cut(text, text.rindex("}", at, after), "}}"),
    "one ] more": lambda text, at, after: cut(text, text.rindex("]", at, after), "]]"),
    "one quote more": lambda text, at, after: cut(text, at, '""'),
    "no comma": lambda text, at, after: cut(text, text.index(",", at)),
}


@pytest.fixture
def made(tmp_path):
    made = conversations.rows(tmp_path, 12)
    made[2]["conversations"][0]["value"] += ' {"brackets": ]}}'
    made[6]["conversations"][0]["value"] += " }]} {["
    return made


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_damaged_row_of_an_array_takes_no_other_with_it(writer, damage, made, tmp_path):
    for rows in ((4,), (4, 5), (0, 7)):
        text = WRITERS[writer](made)
        for i in reversed(rows):
            at, after = (text.index(f"row-0-{k}") - 1 for k in (i, i + 1))
            text = DAMAGES[damage](text, at, after)
        (tmp_path / "d.json").write_text(text, newline="")
        found, problems = checked(tmp_path / "d.json")
        kept = [found.rows[i].id for i in found.indices]
        want = [row["id"] for i, row in enumerate(made) if i not in rows]
        assert [name for name in kept if name in want] == want, (rows, problems.summary())
        assert len(kept) - len(want) <= (damage in ("one } more",)) * len(rows)
        assert len(problems) >= len(rows)
        assert {p.kind for p in problems} <= {"not JSON", "not a row"}
        assert "bytes from line" in problems.summary()


def test_rows_on_one_line_are_lost_behind_a_damaged_one_and_it_is_said(made, tmp_path, monkeypatch):
    monkeypatch.setattr("fastprompt.train.spans.LONGEST", 1000)
    text = json.dumps(made)
    start = text.index('{"id": "row-0-4"')
    text = DAMAGES["no }"](text, start, text.index('"row-0-5"'))
    (tmp_path / "d.json").write_text(text)
    found, problems = checked(tmp_path / "d.json")
    (problem,) = problems
    assert len(found) == 4 and problem.where.endswith("d.json:1[4]")
    assert problem.reason.startswith(f"{len(text) - start:,} bytes from line 1 on: ")
    assert len(text) - start > 1000 == len(found.rows.raw(4))  # no more is read


def test_an_array_without_its_end(made, tmp_path):
    whole = by_lines(made)
    for end in (",\n", "\n", ""):
        (tmp_path / "d.json").write_text(whole.rstrip("\n]") + end)
        found, problems = checked(tmp_path / "d.json")
        (problem,) = problems
        assert len(found) == 12 and problem.reason == (
            "want ']' after the last row, got the end of the file"
        )
    (tmp_path / "d.json").write_text(whole)
    whole = checked(tmp_path / "d.json")[0]
    assert found.digest == whole.digest


def test_what_stands_outside_of_an_array_is_said(made, tmp_path):
    row = json.dumps(conversation(ASK, TELL, id="last"))
    for text, kinds in (
        (f"[{row}] 7", ["not a row"]),
        (f"[7] x [{row}]", ["not a row", "not JSON"]),
        (f"[] {row}", ["not JSON"]),
    ):
        (tmp_path / "d.json").write_text(text)
        found, problems = checked(tmp_path / "d.json")
        assert len(found) == 1 and [p.kind for p in problems] == kinds
