"""Lists of images with captions: the forms that are read, and what is wrong with others."""

import json

import pytest

from diffalign.data import read_captioned


def written(folder, *lines):
    (folder / "a.png").touch()
    path = folder / "list.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lists_of_samples_and_of_imagefolders(tmp_path):
    path = written(
        tmp_path,
        {"file": "a.png", "prompt": "one", "id": 3},
        "",
        {"file_name": "a.png", "text": "two"},
        {"file_name": "a.png", "caption": "three", "text": "not this"},
    )
    found = read_captioned(path)
    assert [image.caption for image in found] == ["one", "two", "three"]
    assert {image.image for image in found} == {tmp_path / "a.png"}
    assert [image.source for image in found] == [f"{path}, line {n}" for n in (1, 3, 4)]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ({"file": "a.png"}, ValueError, r"line 2: prompt is None, and must be a text that is not empty\.$"),
        ({"file": "a.png", "prompt": " "}, ValueError, "line 2: prompt is ' ', and must be a text"),
        ({"prompt": "one"}, ValueError, "line 2: file is None, and must be a text"),
        ({"file": "b.png", "prompt": "one"}, FileNotFoundError, r"line 2: .*b\.png does not exist: paths start from"),
        ("[1]", ValueError, "line 2: expected an object with file and prompt, found list"),
        ("{", ValueError, "line 2: Expecting property name"),
        ("[" * 100_000, ValueError, "line 2: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, line, kind, message):
    with pytest.raises(kind, match=message):
        read_captioned(written(tmp_path, {"file": "a.png", "prompt": "one"}, line))


def test_a_list_that_is_not_there_or_is_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_captioned(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"is a folder: give the \.jsonl in it"):
        read_captioned(tmp_path)
    with (tmp_path / "long.jsonl").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="has more than 268,435,456 bytes: split it"):
        read_captioned(tmp_path / "long.jsonl")
    with pytest.raises(ValueError, match="lists no image"):
        read_captioned(written(tmp_path, ""))
