"""Files that metadata names: where their paths start, what is known of them, and whatever they may be."""

import json
import os
import tarfile
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.rewards import ParetoRank
from diffalign.rewards.conditions import DepthConsistency, EdgeConsistency, SegmentationConsistency
from diffalign.rewards.frames import FrameReward
from diffalign.rewards.subject import SubjectSimilarity
from diffalign.scoring import references, score
from diffalign.scoring.references import file_keys
from tests.scoring.pictures import Redder, encoded, picture, red, rows
from tests.scoring.test_inputs import write_tar


def folder_with(path, told, count=2):
    """Pictures 0, 1, ..., each with this in its sidecar, and picture 50 in a folder beside theirs."""
    path.mkdir(parents=True)
    (path.parent / "subjects").mkdir(exist_ok=True)
    picture(50).save(path.parent / "subjects" / "dog.png")
    for number in range(count):
        picture(number).save(path / f"{number:03d}.png")
        (path / f"{number:03d}.json").write_text(json.dumps(told))
    return path


def found_in(inputs, tmp_path, reward=None, **options):
    result = score(inputs, [reward or Redder()], tmp_path / "out.jsonl", progress=False, **options)
    return rows(result.out)


def test_a_path_starts_in_the_folder_of_its_sidecar(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "in" / "deep", {"reference": "../subjects/dog.png", "note": "x"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = found_in([folder, folder / "001.png"], tmp_path)
    assert [row["redder"] for row in found] == pytest.approx([red(n) - red(50) for n in (0, 1, 1)], abs=1e-6)
    assert {row["reference"] for row in found} == {"../subjects/dog.png"}  # the table says what the sidecar says


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "bytes"])
def test_a_path_starts_in_the_folder_of_its_list(tmp_path, kind):
    folder_with(tmp_path / "in" / "deep", {})
    columns = {"path": ["in/deep/000.png", "in/deep/001.png"], "reference": ["in/subjects/dog.png", "in/deep/000.png"]}
    several = columns | {"reference": [["in/subjects/dog.png"], ["in/deep/000.png", "in/subjects/dog.png"]]}
    expected = [red(0) - red(50), red(1) - red(0)]
    if kind == "csv":
        text = "".join(",".join(row) + "\n" for row in (columns, *zip(*columns.values(), strict=True)))
        (tmp_path / "list.csv").write_text(text)
    else:
        expected[1] = red(1) - (red(0) + red(50)) / 2
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(several, row, strict=True))) for row in zip(*several.values(), strict=True)]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
    elif kind == "parquet":
        pq.write_table(pa.table(several), tmp_path / "list.parquet")
    elif kind == "bytes":
        table = {"image": [encoded(0), encoded(1)], "reference": several["reference"]}
        pq.write_table(pa.table(table), tmp_path / "list.bytes.parquet")
    (inputs,) = tmp_path.glob("list.*")
    assert [row["redder"] for row in found_in(inputs, tmp_path)] == pytest.approx(expected, abs=1e-6)


def test_a_path_in_a_prompt_file_starts_there_and_others_where_they_did(tmp_path):
    folder = folder_with(tmp_path / "in" / "deep", {"reference": "../subjects/dog.png"})
    (tmp_path / "in" / "p.jsonl").write_text(
        '{"prompt": "a", "reference": "deep/001.png"}\n{"prompt": "b", "seed": 1}\n'
    )
    found = found_in(folder, tmp_path, prompts=tmp_path / "in" / "p.jsonl")
    assert [row["redder"] for row in found] == pytest.approx([red(0) - red(1), red(1) - red(50)], abs=1e-6)


def test_a_path_in_a_tar_is_a_member_and_a_reference_is_no_item(tmp_path):
    """Left out are the members that a reward of the run opens, and those alone."""
    members = [
        ("a/000.png", encoded(0)),
        ("a/000.reference.png", encoded(60)),
        ("a/000.json", b'{"reference": "000.reference.png"}'),
        ("a/b/001.png", encoded(1)),
        ("a/b/001.json", json.dumps({"reference": ["../../dogs/x.png", str(tmp_path / "y.png")]}).encode()),
        ("dogs/x.png", encoded(61)),
        ("dogs/z.png", encoded(62)),
    ]
    write_tar(tmp_path / "in.tar", members)
    picture(63).save(tmp_path / "y.png")
    found = found_in(tmp_path / "in.tar", tmp_path)
    assert [row["path"].rpartition("/")[2] for row in found] == ["000.png", "001.png", "z.png"]
    expected = [red(0) - red(60), red(1) - (red(61) + red(63)) / 2]
    assert [row["redder"] for row in found[:2]] == pytest.approx(expected, abs=1e-6)
    assert found[2]["redder_reason"] == "no reference in its metadata"
    plain = score(tmp_path / "in.tar", ["jpeg-size"], tmp_path / "plain.jsonl", progress=False)
    assert plain.rows == 5


def test_a_changed_file_is_noticed_and_has_no_known_score(tmp_path):
    folder = folder_with(tmp_path / "in" / "deep", {"reference": "../subjects/dog.png"}, count=3)
    picture(51).save(tmp_path / "cat.png")
    (folder / "002.json").write_text(json.dumps({"reference": str(tmp_path / "cat.png")}))
    cache, first = tmp_path / "cache", Redder()
    score(folder, [first], tmp_path / "first.csv", cache=cache, progress=False)
    assert sum(first._seen) == 3

    (tmp_path / "in" / "subjects" / "dog.png").rename(tmp_path / "in" / "subjects" / "wolf.png")
    for number in range(2):
        (folder / f"{number:03d}.json").write_text('{"reference": "../subjects/wolf.png"}')
    again = Redder()
    score(folder, [again], tmp_path / "second.csv", cache=cache, progress=False)
    assert again._seen == []  # another name, and the same content

    picture(52, size=(30, 30)).save(tmp_path / "in" / "subjects" / "wolf.png")
    with pytest.raises(ValueError, match=r"2 inputs are changed, such as .*000\.png"):
        score(folder, [Redder()], tmp_path / "second.csv", cache=cache, progress=False)
    changed = Redder()
    found = rows(score(folder, [changed], tmp_path / "third.csv", cache=cache, progress=False).out)
    assert sum(changed._seen) == 2
    expected = [red(n) - red(52, size=(30, 30)) for n in range(2)]
    assert [float(row["redder"]) for row in found[:2]] == pytest.approx(expected, abs=1e-6)
    assert float(found[2]["redder"]) == pytest.approx(red(2) - red(51), abs=1e-6)


HOSTILE = {
    "gone.png": "reference {}/gone.png: there is no such file",
    "": "reference {}: is a folder, not a file",
    "pipe.png": "reference {}/pipe.png: is not a regular file",
    "link.png": "reference {}/link.png: there is no such file",
    "empty.png": "reference {}/empty.png: is empty",
    "large.png": "reference {}/large.png: has 2,000 bytes: at most 1,000 are read",
    "a\0b.png": r"a\x00b.png': cannot be looked at",
    "\ud83d.png": "cannot be looked at",
    "x" * 5000: "File name too long",
    "text.png": "is not a PNG, JPEG, WEBP image",
}


def test_a_hostile_reference_costs_its_own_row(tmp_path, monkeypatch):
    """Nothing waits, nothing ends the run, and what is known to be missing is in no batch."""
    monkeypatch.setattr(references, "MAX_FILE_BYTES", 1000)
    folder = folder_with(tmp_path / "in", {"reference": "../subjects/dog.png"}, count=len(HOSTILE) + 5)
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.json").write_text("{}")
    (folder / "link.png").symlink_to("nowhere")
    (folder / "empty.png").touch()
    (folder / "large.png").write_bytes(b"\0" * 2000)
    (folder / "text.png").write_text("no image")
    others = [3, {"path": "x"}, [], [["a.png"]]]
    for number, told in enumerate([*HOSTILE, *others]):
        (folder / f"{number:03d}.json").write_text(json.dumps({"reference": told}))
    reward = Redder()
    found = found_in(folder, tmp_path, reward)[: len(HOSTILE) + 5]
    for row, told in zip(found, HOSTILE.values(), strict=False):
        assert told.format(folder) in row["redder_reason"]
        assert row["redder_reason"].isprintable()
    assert all(row["redder"] is None and row["redder_reason"] for row in found[:-1])
    assert found[-1]["redder"] == pytest.approx(red(len(found) - 1) - red(50), abs=1e-6)
    assert reward._seen[0] == 6  # the text, the four others and the good one


def test_a_hostile_reference_in_a_tar_costs_its_own_row(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    told = ["gone.png", "link.png", "../../../../etc/passwd", "text.png", "good.png"]
    members = [(f"{number}.png", encoded(number)) for number in range(5)]
    members += [(f"{number}.json", json.dumps({"reference": path}).encode()) for number, path in enumerate(told)]
    write_tar(tmp_path / "in.tar", [*members, ("text.png", b"no image"), ("good.png", encoded(60))])
    with tarfile.open(tmp_path / "in.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = found_in(tmp_path / "in.tar", tmp_path)
    reasons = [row["redder_reason"] for row in found]
    assert len(found) == 5
    assert reasons[0] == f"reference {tmp_path}/in.tar/gone.png: there is no such image in the tar"
    assert reasons[1] == f"reference {tmp_path}/in.tar/link.png: is a link or no plain file of the tar"
    assert reasons[2].endswith("etc/passwd: there is no such image in the tar")
    assert f"{tmp_path}/in.tar/text.png is not a PNG" in reasons[3]  # and not where it was unpacked
    assert found[4]["redder"] == pytest.approx(red(4) - red(60), abs=1e-6)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_missing_reference_leaves_the_group(tmp_path):
    folder = folder_with(tmp_path / "in", {"prompt": "p", "reference": "../subjects/dog.png"}, count=4)
    (folder / "002.json").write_text('{"prompt": "p", "reference": "gone.png"}')
    found = found_in(folder, tmp_path, ParetoRank([Redder()], name="rank"))
    order = sorted((0, 1, 3), key=red)
    assert [found[number]["rank"] for number in order] == [0, 0.5, 1]
    assert found[2]["rank_reason"].endswith("gone.png: there is no such file")


def test_rewards_name_the_keys_and_so_do_those_made_of_them(tmp_path):
    for kind in (SubjectSimilarity, DepthConsistency, EdgeConsistency, SegmentationConsistency):
        assert kind.files == kind.needs
    edges = EdgeConsistency()
    assert file_keys(edges + 0.5 * Redder()) == ("edges", "reference")
    assert file_keys(FrameReward(edges)) == ("edges",)
    folder = folder_with(tmp_path / "in", {"edges": "001.png"})
    found = found_in(folder, tmp_path, edges)
    assert found[1]["edge-consistency"] == pytest.approx(0, abs=1e-7)
    assert found[0]["edge-consistency"] < -1e-3


def test_without_such_a_reward_nothing_is_looked_at(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "in", {"prompt": "p", "reference": "gone.png"})
    monkeypatch.setattr(references, "file_item", None)
    found = found_in(folder, tmp_path, lambda images, prompts, metadata: [len(m["reference"]) for m in metadata])
    assert [row["<lambda>"] for row in found] == [8, 8]
