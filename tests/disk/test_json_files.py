"""Whatever lies where a description belongs: it is an object, or it is refused in one sentence that names the file."""

import os

import pytest

from vq4dit.disk.json_files import LARGEST_BYTES, leaves, read_object
from vq4dit.errors import FormatError

BROKEN = {
    "list": (b"[]", r"must hold a JSON object, \{...\}, found \[\]"),
    "null": (b"null", "must hold a JSON object, {...}, found None"),
    "empty": (b"", "is not valid JSON"),
    "cut": (b'{"a": 1', "is not valid JSON"),
    "latin-1": ('{"a": "ä"}'.encode("latin-1"), "is not valid JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
    "long number": (b'{"a": ' + b"9" * 6000 + b"}", "is not valid JSON"),
    "nested beyond reading": (b"[" * 100_000 + b"]" * 100_000, "is nested too deep"),
    "nested beyond use": (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deep"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_object_is_refused_by_name(tmp_path, kind):
    content, words = BROKEN[kind]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words.replace("{...}", r"\{...\}")) as refusal:
        read_object(path)
    assert str(path) in str(refusal.value) and str(refusal.value).endswith(": download the model again")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "larger than memory"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        with open(path, "wb") as file:
            file.truncate(LARGEST_BYTES + 1)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_object(path)


def test_what_is_not_there_is_for_the_caller_to_explain(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "config.json")


def test_leaves_are_named_by_their_way():
    found = {name: value for _, name, value in leaves({"a": {"b": [1, {"c": 2}]}, "d": [], "e": "x"})}
    assert found == {"a.b.0": 1, "a.b.1.c": 2, "d": None, "e": "x"}
