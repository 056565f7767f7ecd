"""Where training rows lie, and everything that can be wrong with them."""

import io
import json
import re
import tarfile
from dataclasses import asdict

import conversations
import numpy as np
import pytest
from PIL import Image
from PIL.ContainerIO import ContainerIO

from fastprompt.train.checking import Problems, Rows, TrainingError, check, choose
from fastprompt.train.rows import BadRow
from fastprompt.train.sources import JsonRows
from fastprompt.train.templates import ChatTemplate

TEMPLATE = ChatTemplate(conversations.processor(), "auto", 4)


def checked(*paths, fatal=False, images=None, **more):
    problems = Problems(fatal=fatal)
    options = dict(max_length=200) | more
    return check(Rows([str(p) for p in paths], images), TEMPLATE, problems, **options), problems


def said(row):
    return [text for _, text in row.turns]


@pytest.fixture
def made(tmp_path):
    return conversations.rows(tmp_path, 12)


LAYOUTS = {
    "indented": dict(indent=2),
    "one line": {},
    "escaped": dict(ensure_ascii=True),
    "unicode": dict(ensure_ascii=False, indent="\t"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_rows_are_found_by_their_bytes(layout, made, tmp_path):
    made[3]["conversations"][0]["value"] += ' a "quoted\\" {brace] é 猫 \\'
    made[4]["more"] = [{"deep": [{"er": "}"}]}]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(made, **LAYOUTS[layout]), encoding="utf-8")
    rows = Rows([str(path)])
    assert [json.loads(rows.raw(i)) for i in range(len(rows))] == made
    assert [rows[i].id for i in range(12)] == [row["id"] for row in made]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len({rows.where(i) for i in range(12)}) == 12
    for i in range(12):
        line, number = re.search(r":(\d+)(\[\d+\])?$", rows.where(i)).groups()
        line = int(line)
        assert number == (f"[{i}]" if len(lines) == 1 else None)
        assert lines[line - 1].lstrip("[ \t").startswith("{")
        if layout == "indented":
            assert made[i]["id"] in lines[line]


def test_jsonl_and_json_and_bom_hold_the_same(made, tmp_path):
    conversations.write_jsonl(tmp_path / "d.jsonl", made)
    text = json.dumps(made)
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    spaced = "\r\n\n".join(json.dumps(row) for row in made)
    (tmp_path / "spaced.json").write_text("\n \n" + spaced)  # JSONL under another name
    want = [json.dumps(row) for row in made]
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "d.jsonl").read_bytes())
    for name in ("d.jsonl", "d.json", "spaced.json", "bom.jsonl"):
        rows = Rows([str(tmp_path / name)])
        assert [rows.raw(i).decode().strip() for i in range(len(rows))] == want
    assert Rows([str(tmp_path / "spaced.json")]).where(1).endswith("spaced.json:5")
    assert not checked(tmp_path / "bom.jsonl")[1]


def test_newlines_beyond_a_chunk(made, tmp_path, monkeypatch):
    monkeypatch.setattr("fastprompt.train.spans._CHUNK", 7)
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    assert [json.loads(JsonRows(path, None).raw(i)) for i in range(12)] == made


def paired(made, tmp_path):
    """The same rows as files that share a name: (name, bytes)."""
    for i, row in enumerate(made):
        if "image" in row:
            yield f"part/{i:03}.png", (tmp_path / row["image"]).read_bytes()
        yield f"part/{i:03}.json", json.dumps({k: row[k] for k in row if k != "image"}).encode()


def test_tar_shards_and_folders(made, tmp_path):
    conversations.write_jsonl(tmp_path / "d.jsonl", made)
    want, problems = checked(tmp_path / "d.jsonl")
    assert not problems and len(want) == 12
    folder = tmp_path / "folder"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in paired(made, tmp_path):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    for path, where in ((tmp_path / "s.tar", "s.tar:part/003"), (folder, "folder:part/003")):
        found, problems = checked(path)
        assert not problems and found.lengths.tolist() == want.lengths.tolist()
        assert found.rows.where(3).endswith(where)
        for i in range(12):
            ours, theirs = found.rows[i], want.rows[i]
            assert ours.turns == theirs.turns and ours.id == theirs.id
            if ours.image is not None:
                pixels = [np.asarray(row.open_image()) for row in (ours, theirs)]
                assert np.array_equal(*pixels)


def test_captions_beside_images(tmp_path):
    conversations.draw("red", "circle").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" a red circle\n")
    conversations.draw("red", "square").save(tmp_path / "b.JPG", format="JPEG")
    (tmp_path / "c.txt").write_text("no image")
    found, problems = checked(tmp_path)
    assert len(found) == 1 and said(found.rows[found.indices[0]]) == ["<image>", "a red circle"]
    kinds = {p.where.rpartition(":")[2]: p.kind for p in problems}
    assert kinds == {"b": "no answer", "c": "missing image"}


def conversation(*texts, **more):
    turns = [{"from": who, "value": text} for who, text in texts]
    return {"conversations": turns, **more}


ASK, TELL = ("human", "What?"), ("gpt", "That.")
BAD = {
    "no answer": [
        conversation(ASK),
        conversation(ASK, TELL, ASK),
        conversation(TELL, ASK),
        conversation(ASK, ("gpt", " \n")),
        conversation(),
    ],
    "not a row": [
        {"id": 1},
        [1],
        7,
        {"conversations": "text"},
        conversation(TELL),
        conversation(ASK, ASK, TELL),
        conversation(ASK, ("bot", "x")),
        conversation((["human"], "What?"), TELL),
        conversation(ASK, ("gpt", 5)),
        conversation(ASK, TELL, ("system", "x")),
        {"conversations": ["x"]},
        conversation(ASK, TELL, image=["a.png"]),
    ],
    "missing image": [
        conversation(ASK, TELL, image="none.png"),
        conversation(ASK, TELL, image="a\0.jpg"),
        conversation(ASK, TELL, image="\ud83d.jpg"),
    ],
    "not UTF-8": [
        conversation(ASK, TELL, id="x\ud83d"),
        conversation(ASK, ("gpt", "x\ud83d")),
        conversation(("human", "\ude00"), TELL),
    ],
    "image shape": [
        conversation(ASK, TELL, image="long.png"),
        conversation(ASK, TELL, image="tall.png"),
    ],
    "broken image": [
        conversation(ASK, TELL, image="text.jpg"),
        conversation(ASK, TELL, image="empty.png"),
    ],
    "image marks": [
        conversation(("human", "<image> x"), TELL),
        conversation(("human", "<image><image>"), TELL, image="good.png"),
        conversation(ASK, ("gpt", "<image>"), image="good.png"),
        conversation(ASK, ("gpt", "<image>")),
    ],
    "too long": [conversation(ASK, ("gpt", "x" * 200))],
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bad_rows_are_named_and_the_others_kept(kind, suffix, tmp_path):
    conversations.draw("red", "circle").save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (200_000, 1)).save(tmp_path / "long.png")
    Image.new("L", (1, 201)).save(tmp_path / "tall.png")
    good = [conversation(ASK, TELL, id=f"g{i}") for i in range(2)]
    for bad in BAD[kind]:
        made = [good[0], bad, good[1]]
        path = tmp_path / f"d.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(made).replace('}, {"conv', '},\n{"conv'))
        else:
            conversations.write_jsonl(path, made)
        found, problems = checked(path)
        assert [found.rows[i].id for i in found.indices] == ["g0", "g1"], bad
        (problem,) = problems
        assert problem.kind == kind, (bad, problem)
        if suffix == "jsonl":
            assert problem.where == f"{path}:2"
        assert kind in problems.summary() and problem.reason in problems.summary()
        problems.write(tmp_path / "bad_rows.jsonl")  # in UTF-8, whatever they say
        (line,) = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == asdict(problem)
        with pytest.raises(TrainingError, match="--on-bad-row skip"):
            checked(path, fatal=True)


def test_bytes_that_are_no_text(tmp_path):
    row = json.dumps(conversation(ASK, TELL)).encode()
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([row, row.replace(b"That", b"Th\xe9t"), row[:-3], row]))
    found, problems = checked(path, keep_duplicates=True)
    assert found.indices.tolist() == [0, 3]
    assert [(p.where[-1], p.kind) for p in problems] == [("2", "not UTF-8"), ("3", "not JSON")]
    assert "0xe9" in problems.summary()


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 600 + "]" * 600, "[" * 10**6])
def test_rows_that_python_itself_refuses(value, tmp_path):
    good = json.dumps(conversation(ASK, TELL, id="good"))
    bad = json.dumps(conversation(ASK, TELL, id=0)).replace('"id": 0', f'"id": {value}')
    path = tmp_path / "d.jsonl"
    path.write_text(f"{bad}\n{good}\n")
    found, problems = checked(path)
    assert "good" in [found.rows[i].id for i in found.indices]
    assert {p.kind for p in problems} <= {"not JSON"} and len(found) + len(problems) == 2


def test_sides_of_an_image(tmp_path):
    Image.new("L", (200, 1)).save(tmp_path / "a.png")
    path = conversations.write_jsonl(tmp_path / "d.jsonl", [conversation(ASK, TELL, image="a.png")])
    assert not checked(path)[1]
    Image.new("L", (201, 1)).save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="want at most 1 to 200, got 201 × 1"):
        checked(path)


def test_a_truncated_array_keeps_what_came_before(made, tmp_path):
    text = json.dumps(made, indent=1)
    path = tmp_path / "d.json"
    path.write_text(text[: text.index("row-0-7") + 3])
    found, problems = checked(path)
    assert len(found) == 7
    (problem,) = problems
    assert problem.kind == "not JSON"
    assert int(problem.where.rpartition(":")[2]) == text[: text.index("row-0-7")].count("\n")


def test_duplicate_ids(made, tmp_path):
    made[5]["id"] = made[2]["id"]
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    found, problems = checked(path)
    assert 5 not in found.indices and len(found) == 11
    assert [(p.kind, p.id, p.where) for p in problems] == [
        ("duplicate id", made[2]["id"], f"{path}:6")
    ]
    assert "--duplicate-ids keep" in problems.summary()
    found, problems = checked(path, keep_duplicates=True)
    assert len(found) == 12 and not problems


def test_rows_without_an_id_are_no_duplicates(made, tmp_path):
    for row in made:
        row["id"] = None
    del made[0]["id"]
    first = conversations.write_jsonl(tmp_path / "a.jsonl", made)
    second = conversations.write_jsonl(tmp_path / "b.jsonl", made)
    found, problems = checked(first, second)
    assert len(found) == 24 and not problems
    assert found.rows[0].id == f"{first}:1" and found.rows[13].id == f"{second}:2"


def test_rows_on_one_line_are_told_apart(made, tmp_path):
    """What json.dump writes: a problem each, and no two without an id are duplicates."""
    for row in made:
        row["id"] = None
    made[3]["conversations"].pop()
    made[7]["image"] = "none.png"
    path = tmp_path / "d.json"
    path.write_text(json.dumps(made))
    found, problems = checked(path)
    assert len(found) == 10
    assert {p.where: p.kind for p in problems} == {
        f"{path}:1[3]": "no answer", f"{path}:1[7]": "missing image",
    }  # fmt: skip


def test_a_bad_row_does_not_make_the_good_one_of_its_id_a_duplicate(made, tmp_path):
    made[2] = dict(made[3], image="none.png")
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    found, problems = checked(path)
    assert [p.kind for p in problems] == ["missing image"] and 3 in found.indices


def test_the_longest_row(made, tmp_path):
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    longest = int(checked(path)[0].lengths.max())
    assert not checked(path, max_length=longest)[1]
    found, problems = checked(path, max_length=longest - 1)
    assert {p.kind for p in problems} == {"too long"} and len(found) + len(problems) == 12
    assert found.lengths.max() < longest
    assert f"{longest} tokens; want at most {longest - 1}" in problems.summary()


def test_empty_files(made, tmp_path):
    path, empty = conversations.write_jsonl(tmp_path / "d.jsonl", made), tmp_path / "e.jsonl"
    for content in ("", "\n\n", "[]"):
        empty.write_text(content)
        found, problems = checked(empty, path)
        assert len(found) == 12
        assert [(p.where, p.kind) for p in problems] == [(str(empty), "empty file")]
        with pytest.raises(TrainingError, match="no usable row in"):
            checked(empty)
        with pytest.raises(TrainingError, match="empty file"):
            checked(empty, path, fatal=True)


def test_a_broken_jpeg_is_found_where_all_are_decoded(made, tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "n.jpg")
    whole = (tmp_path / "n.jpg").read_bytes()
    (tmp_path / "n.jpg").write_bytes(whole[: len(whole) // 2])
    made[0]["image"] = "n.jpg"
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    assert not checked(path)[1]  # its head is whole
    (problem,) = checked(path, decode=True)[1]
    assert problem.kind == "broken image" and "n.jpg" in problem.reason
    with pytest.raises(BadRow):
        Rows([str(path)])[0].open_image()


def test_heads_alone_are_read(made, tmp_path, monkeypatch):
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    row, sizes = Rows([str(path)])[0], []
    with open(row.image.path, "ab") as file:
        file.truncate(2**30)  # of which nothing is on the disk
    read = ContainerIO.read
    monkeypatch.setattr(ContainerIO, "read", lambda self, n=-1: (sizes.append(n), read(self, n))[1])
    assert row.open_image(decode=False).size == (24, 24)
    assert sizes and all(0 < n < 2**16 for n in sizes)


def test_images_lie_in_a_folder_of_their_own(made, tmp_path):
    path = tmp_path / "elsewhere" / "d.jsonl"
    path.parent.mkdir()
    conversations.write_jsonl(path, made)
    assert len(checked(path)[1]) == 10
    assert not checked(path, images=str(tmp_path))[1]


def test_what_is_not_served(tmp_path):
    with pytest.raises(ValueError, match="which is not there"):
        Rows([str(tmp_path / "none.json")])
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ValueError, match="or a folder of images; got"):
        Rows([str(tmp_path / "d.csv")])
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="want an uncompressed tar"):
        Rows([str(tmp_path / "s.tar")])


def test_the_hash_tells_data_apart(made, tmp_path):
    path = conversations.write_jsonl(tmp_path / "d.jsonl", made)
    digest = checked(path)[0].digest
    assert checked(path)[0].digest == digest
    conversations.draw("red", "circle", 40).save(tmp_path / made[0]["image"])
    assert checked(path)[0].digest != digest  # an image of another size
    digest = checked(path)[0].digest
    made[1]["conversations"][1]["value"] = "pink"
    conversations.write_jsonl(path, made)
    assert checked(path)[0].digest != digest


def test_choosing(made, tmp_path):
    found, _ = checked(conversations.write_jsonl(tmp_path / "d.jsonl", made))
    train, held = choose(found, 3, 1.0, 0)
    assert sorted([*train.indices, *held.indices]) == list(range(12)) and len(held) == 3
    assert (np.diff(train.indices) > 0).all()
    for i, length in zip(train.indices, train.lengths, strict=True):
        assert found.lengths[i] == length
    half, same = choose(found, 3, 0.5, 0)
    assert len(half) == 4 and set(half.indices) < set(train.indices)
    assert same.indices.tolist() == held.indices.tolist()
    assert len(choose(found, 0, 5, 0)[0]) == 5
    assert choose(found, 3, 1.0, 1)[1].indices.tolist() != held.indices.tolist()
    for hold_out, subset in ((12, 1.0), (13, 1.0), (4, 9)):
        with pytest.raises(TrainingError, match="got 12 usable rows"):
            choose(found, hold_out, subset, 0)
