"""Files that are damaged as a whole: arrays, tar shards, folders. What is left trains; all of what
is lost is said."""

import io
import json
import os
import tarfile

import conversations
import pytest
from test_train_rows import ASK, TELL, checked, conversation

from fastprompt.train.checking import Rows, TrainingError
from fastprompt.train.rows import Blob


def kinds(path, problems):
    """By where in the shard or the folder they are."""
    return {p.where.removeprefix(f"{path}:"): p.kind for p in problems}


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
    if writer == "indented":
        made[8]["boxes"] = [{"left": 1}]  # a line that begins like a row, but for its place
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
        (f"[7] ] [{row}]", ["not a row"]),
    ):
        (tmp_path / "d.json").write_text(text)
        found, problems = checked(tmp_path / "d.json")
        assert len(found) == 1 and [p.kind for p in problems] == kinds


# ---- shards ----


def shard(path, made, folder):
    """Image and text of each row in turn; each member's first byte."""
    with tarfile.open(path, "w") as tar:
        for i, row in enumerate(made):
            text = {k: row[k] for k in row if k != "image"}
            add(tar, f"{i:03}.json", json.dumps(text).encode())
            if "image" in row:
                add(tar, f"{i:03}.png", (folder / row["image"]).read_bytes())
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar}


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# (the shard's bytes, the members' first bytes) -> (bytes, where the damage is said to begin)
SHARDS = {
    "a header of a text": lambda d, m: (flip(d, m["007.json"] + 5), m["007.json"]),
    "a header of an image": lambda d, m: (flip(d, m["007.png"] + 5), m["007.json"]),
    "a size": lambda d, m: (flip(d, m["007.json"] + 130), m["007.json"]),
    "a header of zeros": lambda d, m: (
        d[: m["007.json"]] + bytes(512) + d[m["007.json"] + 512 :],
        m["007.json"],
    ),
    "cut in a text": lambda d, m: (d[: m["007.json"] + 600], m["007.json"]),
    "cut in an image": lambda d, m: (d[: m["007.png"] + 530], m["007.json"]),
    "cut in a header": lambda d, m: (d[: m["007.json"] + 99], m["007.json"]),
    "cut between rows": lambda d, m: (d[: m["007.json"]], m["007.json"]),
    "cut between text and image": lambda d, m: (d[: m["007.png"]], m["007.json"]),
    "cut in what fills up": lambda d, m: (d[: m["007.json"] - 1], m["007.json"] - 1),
    "two in one": lambda d, m: (d[: m["007.json"]] + bytes(1024) + d, m["007.json"]),
}


@pytest.mark.parametrize("how", SHARDS)
def test_a_damaged_shard_keeps_the_rows_before(how, made, tmp_path):
    path = tmp_path / "s.tar"
    members = shard(path, made, tmp_path)
    assert not checked(path)[1]
    data, at = SHARDS[how](path.read_bytes(), members)
    path.write_bytes(data)
    found, problems = checked(path)
    (problem,) = problems
    assert problem.where == f"{path}: from byte {at} on" and problem.kind == "damaged tar"
    want = f"{len(data) - at:,} bytes of neither" if at < len(data) else "the end of the file"
    assert want in problem.reason
    assert [found.rows[i].id for i in found.indices] == [row["id"] for row in made[:7]]
    assert [row.image is not None for row in map(found.rows.__getitem__, range(7))] == [
        "image" in row for row in made[:7]
    ]
    with pytest.raises(TrainingError, match=f"from byte {at} on: damaged tar"):
        checked(path, fatal=True)


def test_the_last_row_before_the_damage_may_have_lost_its_image(made, tmp_path):
    """A text alone, and the header behind it is broken."""
    path = tmp_path / "s.tar"
    members = shard(path, made, tmp_path)
    assert "image" not in made[5]
    path.write_bytes(flip(path.read_bytes(), members["006.json"]))
    found, problems = checked(path)
    assert len(found) == 5
    assert [p.where for p in problems] == [f"{path}: from byte {members['005.json']} on"]


def test_shards_that_hold_nothing_and_such_that_are_none(tmp_path):
    row, path = tmp_path / "d.jsonl", tmp_path / "s.tar"
    conversations.write_jsonl(row, [conversation(ASK, TELL)])
    for data in (b"", bytes(10240)):
        path.write_bytes(data)
        assert [(p.where, p.kind) for p in checked(row, path)[1]] == [(str(path), "empty file")]
    for data in (b"x", b"not a tar " * 1000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="want an uncompressed tar"):
            checked(row, path)


def test_members_that_are_no_files(made, tmp_path):
    """A link has no data of its own, and its row does not train without its image."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.json", json.dumps(conversation(ASK, TELL, id="a")).encode())
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.LNKTYPE, "b.png"
        tar.addfile(link)
        add(tar, "b.json", json.dumps(conversation(ASK, TELL, id="b")).encode())
    found, problems = checked(path)
    assert len(found) == 1 and kinds(path, problems) == {"a": "cannot be read"}


# ---- folders ----


def image(path):
    conversations.draw("red", "circle").save(path)


def test_a_row_that_names_an_image_does_not_train_without(tmp_path):
    row = json.dumps(conversation(ASK, TELL, id="a", image="a.png"))
    (tmp_path / "a.json").write_text(row)
    (tmp_path / "b.json").write_text(row.replace('"a"', '"b"'))
    image(tmp_path / "b.png")
    found, problems = checked(tmp_path)
    assert [found.rows[i].id for i in found.indices] == ["b"]
    assert [(p.id, p.kind) for p in problems] == [("a", "missing image")]
    assert "'a.png'" in problems.summary()


def test_names_with_dots(tmp_path):
    for i in range(3):
        image(tmp_path / f"photo.{i}.png")
        (tmp_path / f"photo.{i}.txt").write_text(f"number {i}")
    image(tmp_path / "x.png")
    (tmp_path / "x.png.json").write_text(json.dumps(conversation(ASK, TELL)))
    found, problems = checked(tmp_path)
    assert not problems and all(found.rows[i].image for i in found.indices)
    assert [found.rows[i].turns[1][1] for i in found.indices] == [
        "number 0", "number 1", "number 2", "That.",
    ]  # fmt: skip

    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:  # WebDataset's rule
        for name in ("a.png", "a.txt", "a.cls", "a.1.png", "photo.1.png", "photo.1.txt"):
            add(tar, name, b"text" if name[-3:] != "png" else (tmp_path / "x.png").read_bytes())
    found, problems = checked(path)
    assert len(found) == 1
    assert kinds(path, problems) == dict.fromkeys(
        ("a.1.png", "photo.1.png", "photo.1.txt"), "file of no row"
    )


def test_files_of_no_row_are_said(tmp_path):
    for name in ("x.png", ".hidden.png", "._x.png"):
        image(tmp_path / name)
    for name in ("x.txt", "x.cls", "y.tiff", "README", ".DS_Store", "._x.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()
    image(tmp_path / ".cache" / "z.png")
    (tmp_path / ".cache" / "z.txt").write_text("text")
    found, problems = checked(tmp_path)
    assert len(found) == 1
    assert kinds(tmp_path, problems) == dict.fromkeys(("y.tiff", "README"), "file of no row")
    assert kinds(tmp_path, checked(tmp_path, fatal=True)[1]) == kinds(tmp_path, problems)


@pytest.mark.parametrize("names", [("x.jpg", "x.png"), ("x.JSON", "x.json")])
def test_two_files_of_one_name(names, tmp_path):
    image(tmp_path / "x.png")
    image(tmp_path / "y.png")
    for name in ("x.json", "y.json", *names):
        if not name.endswith(("png", "jpg")):
            (tmp_path / name).write_text(json.dumps(conversation(ASK, TELL, id=name)))
        else:
            image(tmp_path / name)
    if len({*os.listdir(tmp_path)}) == 4:
        pytest.skip("a disk that does not tell x.JSON from x.json")
    found, problems = checked(tmp_path)
    assert [found.rows[i].id for i in found.indices] == ["y.json"]
    (problem,) = problems
    assert problem.kind == "two files" and all(name in problem.reason for name in names)


def test_what_cannot_be_read_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "down").mkdir()
    for name in ("a", "b", "down/c", "d"):
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(conversation(ASK, TELL, id=name)))
    (tmp_path / "d.png").unlink()
    (tmp_path / "d.png").symlink_to("none.png")
    (tmp_path / "up").symlink_to(tmp_path)
    read, scan = Blob.read, os.scandir

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        Blob, "read", lambda self: refuse(self.path) if self.path.name == "b.json" else read(self)
    )
    monkeypatch.setattr(os, "scandir", lambda p: refuse(p) if str(p).endswith("down") else scan(p))
    found, problems = checked(tmp_path)
    assert [found.rows[i].id for i in found.indices] == ["a"]
    assert kinds(tmp_path, problems) == {
        f"{tmp_path}/down": "cannot be read", "b": "cannot be read", "d": "cannot be read",
        "up": "file of no row",
    }  # fmt: skip
    assert "Permission denied" in problems.summary()


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        image(tmp_path / f"{name}.png")
    except OSError:
        pytest.skip("a disk that has no such names")
    (tmp_path / f"{name}.txt").write_text("a caption")
    (tmp_path / f"{name}.cls").write_text("1")
    (tmp_path / f"{name}2.txt").write_text("no image")
    found, problems = checked(tmp_path)
    assert len(found) == 1 and len(problems) == 1
    assert Rows([str(tmp_path)])[0].id == f"{tmp_path}:caf\\udce9"
    problems.summary().encode()
    problems.write(tmp_path / "bad_rows.jsonl")


def test_a_byte_order_mark_beside_an_image(tmp_path):
    for name, text in (("a.txt", "a caption"), ("b.json", json.dumps(conversation(ASK, TELL)))):
        image((tmp_path / name).with_suffix(".png"))
        (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8")
    found, problems = checked(tmp_path)
    assert not problems and found.rows[0].turns[1] == ("assistant", "a caption")
