"""Each kind of input gives one row an item, with its own prompt, metadata and pixels."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.scoring import score
from tests.scoring.pictures import Red, encoded, folder_of, picture, red, rows


def scored(inputs, tmp_path, **options):
    result = score(inputs, [Red()], tmp_path / "out.parquet", progress=False, **options)
    found = rows(result.out)
    assert len(found) == result.rows
    assert all((row["red"] is None) != (row["red_reason"] is None) for row in found)
    return found


def test_a_folder_with_sidecars(tmp_path):
    folder = folder_of(tmp_path / "in", 3, prompts=False)
    (folder / "000.txt").write_text("\ufefffrom text\n")
    (folder / "001.txt").write_text("from text")
    (folder / "001.json").write_text(json.dumps({"prompt": "from JSON", "seed": 3, "size": [1, 2]}))
    (folder / "notes.md").write_text("no media")
    picture(7).save(folder / "deep.jpg", quality=95)
    (folder / "below").mkdir()
    picture(8).save(folder / "below" / "008.WEBP", "webp", lossless=True)
    found = scored(folder, tmp_path)
    assert [os.path.relpath(row["path"], folder) for row in found] == [
        "000.png", "001.png", "002.png", "deep.jpg", "below/008.WEBP",
    ]  # fmt: skip
    assert [row["prompt"] for row in found] == ["from text", "from JSON", None, None, None]
    assert [row["seed"] for row in found] == [None, 3, None, None, None]
    assert found[1]["size"] == "[1, 2]"
    assert found[0]["red"] == pytest.approx(red(0, size=(5, 9)), abs=1e-6)
    assert found[4]["red"] == pytest.approx(red(8), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("000.json", "{", "000.json: Expecting property name"),
        ("000.json", "[1]", "holds list"),
        ("000.json", '{"prompt": 3}', "prompt is 3"),
        ("000.txt", b"\xff\xfe", "codec can't decode"),
        ("000.txt", "a" * (2**20 + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_broken_sidecar_is_the_reason_of_its_row(tmp_path, name, text, told):
    folder = folder_of(tmp_path / "in", 2, prompts=False)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    first, second = scored(folder, tmp_path)
    assert told in first["red_reason"]
    assert second["red"] is not None


def test_what_diffalign_sample_writes(tmp_path):
    folder = folder_of(tmp_path / "in", 2, prompts=False)
    picture(9).save(folder / "grid.png")
    lines = [{"file": f"00{i}.png", "prompt": f"p{i}", "id": i, "image": 0, "seed": 5} for i in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = scored(folder, tmp_path)
    assert [(row["prompt"], row["id"], row["seed"]) for row in found] == [("p0", 0, 5), ("p1", 1, 5)]
    assert not any("grid" in row["path"] for row in found)


def test_files_and_lists_together(tmp_path):
    folder = folder_of(tmp_path / "in", 3)
    (folder / "a.csv").write_text('image,caption,style\n000.png,"a, b",oil\n gone.png,c,ink\n')
    (folder / "b.jsonl").write_text('{"path": "001.png", "text": "d", "style": 1}\n\n{"path": "002.png"}\n')
    found = scored([folder / "002.png", folder / "a.csv", folder / "b.jsonl"], tmp_path)
    assert [row["prompt"] for row in found] == ["prompt 2", "a, b", "c", "d", None]
    assert [row["style"] for row in found] == [None, "oil", "ink", "1", None]  # of mixed types: JSON text
    assert found[2]["red_reason"] == "there is no such file"
    assert [row["red"] for row in found[3:]] == pytest.approx([red(1), red(2)], abs=1e-6)


def test_the_prompt_column_and_the_prompts_file(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    (folder / "a.csv").write_text("path,prompt,long\n000.png,x,xx\n001.png,y,yy\n")
    found = scored(folder / "a.csv", tmp_path, prompt_column="long")
    assert [(row["prompt"]) for row in found] == ["xx", "yy"]
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "one").mkdir()
    assert [row["prompt"] for row in scored(folder, tmp_path / "one", prompts=tmp_path / "p.txt")] == ["one", "two"]
    with pytest.raises(ValueError, match="2 prompts for 1 items"):
        scored(folder / "000.png", tmp_path / "one", prompts=tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "a,b\n1,2\n", "has the columns a, b: name the one with the files path or file"),
        ("a.csv", "path,prompt\nx.png\n", "line 2: has another number of cells"),
        ("a.jsonl", '{"path": "x.png"}\n[]\n', "line 2: holds list"),
        ("a.jsonl", '{"path": 3}\n', "line 1: path is 3"),
        ("a.jsonl", "\n", "nothing to score"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        scored(tmp_path / name, tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_bytes(tmp_path, nested):
    data = [encoded(number) for number in range(70)]
    data[5] = None
    data[6] = b"no image"
    cells = [{"bytes": cell, "path": "x"} for cell in data] if nested else data
    table = pa.table({"image": cells, "caption": [f"c{i}" for i in range(70)], "likes": list(range(70))})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=33)
    found = scored(tmp_path / "in.parquet", tmp_path)
    assert [row["path"].rpartition("/")[2] for row in found] == [str(i) for i in range(70)]
    assert found[69]["prompt"] == "c69"
    assert found[69]["likes"] == 69
    assert found[5]["red_reason"] == "the cell is empty"
    assert "is not a PNG, JPEG, WEBP image" in found[6]["red_reason"]
    good = [i for i in range(70) if i not in (5, 6)]
    assert [found[i]["red"] for i in good] == pytest.approx([red(i) for i in good], abs=1e-6)


def test_parquet_with_paths_and_a_broken_one(tmp_path):
    folder = folder_of(tmp_path / "in", 2)
    pq.write_table(pa.table({"file_name": ["001.png"], "prompt": ["p"]}), folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"PAR1 no more")
    good, broken = scored([folder / "a.parquet", folder / "b.parquet"], tmp_path)
    assert good["red"] == pytest.approx(red(1), abs=1e-6)
    assert "cannot be read as parquet" in broken["red_reason"]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_a_webdataset_tar(tmp_path):
    members = [
        ("a/000.png", encoded(0)),
        ("a/000.txt", b"first"),
        ("a/001.jpg.png", encoded(1)),
        ("a/001.json", b'{"prompt": "second", "seed": 1}'),
        ("a/002.png", b"nothing"),
        ("a/003.png", encoded(3)),
        ("a/003.json", b"{"),
        ("a/004.cls", b"3"),
    ]
    write_tar(tmp_path / "in.tar", members)
    with tarfile.open(tmp_path / "in.tar", "a") as tar:
        link = tarfile.TarInfo("a/005.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = scored(tmp_path / "in.tar", tmp_path)
    assert [row["prompt"] for row in found] == ["first", "second", None, None, None]
    assert [row["red"] for row in found[:2]] == pytest.approx([red(0), red(1)], abs=1e-6)
    assert found[1]["seed"] == 1
    told = ["is not a PNG", "003.json: Expecting", "is a link"]
    assert all(words in row["red_reason"] for words, row in zip(told, found[2:], strict=True))


def test_a_tar_that_breaks_off_gives_what_came_before(tmp_path):
    write_tar(tmp_path / "in.tar", [(f"{i}.png", encoded(i, size=(40, 40))) for i in range(4)])
    data = (tmp_path / "in.tar").read_bytes()
    (tmp_path / "in.tar").write_bytes(data[: len(data) // 2 - 3000])
    found = scored(tmp_path / "in.tar", tmp_path)
    assert found[0]["red"] == pytest.approx(red(0, size=(40, 40)), abs=1e-6)
    assert "the tar cannot be read to its end" in found[-1]["red_reason"]


def test_a_tar_header_that_announces_gigabytes_is_not_believed(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    with (tmp_path / "in.tar").open("wb") as file:
        file.write(header.tobuf())
        file.truncate(2**33)  # sparse: there are gigabytes to read
    (only,) = scored(tmp_path / "in.tar", tmp_path)
    assert "a header asks for" in only["red_reason"]


def test_odd_names_and_halves_of_characters(tmp_path):
    folder = folder_of(tmp_path / "in", 1, prompts=False)
    odd = os.fsencode(folder) + b"/odd-\xff.png"
    os.rename(folder / "000.png", odd)
    (folder / os.fsdecode(b"odd-\xff.json")).write_text('{"prompt": "half \\ud83d", "note": "\\ud83d"}')
    for suffix in (".csv", ".jsonl", ".parquet"):
        result = score(folder, [Red()], tmp_path / f"{suffix[1:]}{suffix}", progress=False)
        (row,) = rows(result.out)
        assert row["path"].endswith("odd-\\xff.png")
        assert row["prompt"] == "half \\ud83d"
        assert row["note"] == "\\ud83d"


def test_hundreds_of_keys_are_one_column(tmp_path):
    folder = folder_of(tmp_path / "in", 2, prompts=False)
    (folder / "000.json").write_text(json.dumps({f"key{i}": i for i in range(101)}))
    first, second = scored(folder, tmp_path)
    assert json.loads(first["metadata"])["key100"] == 100
    assert second["metadata"] is None
    assert set(first) == {"path", "prompt", "metadata", "red", "red_reason"}
