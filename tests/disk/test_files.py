"""Files are whole or not at all, and places that cannot be written are told before the work."""

import subprocess
from pathlib import Path

import pytest

from vq4dit.disk.files import amount, check_place, write_atomically
from vq4dit.errors import JobError


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (812, "812 bytes"), (4_200, "4.2 kB"), (31_000, "31.0 kB"), (5e6, "5.0 MB"), (2e10, "20.0 GB")],
)
def test_amounts_are_shown_in_a_unit_that_shows_them(count, shown):
    assert amount(count) == shown


def test_a_file_that_seems_to_be_a_left_over_is_not_touched(tmp_path):
    (tmp_path / ".note.partial").write_text("mine")
    write_atomically(tmp_path / "note", b"new")
    assert contents(tmp_path) == {".note.partial": "mine", "note": "new"}


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    write_atomically(tmp_path / ("n" * 255), b"content")
    assert contents(tmp_path) == {"n" * 255: "content"}


@pytest.mark.parametrize("place", ["n" * 256, "new/" + "n" * 256, "/".join(["n" * 200] * 21), "file/x", "file/x/y"])
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JobError, match=r"cannot be used \((File name too long|Not a directory)\): choose another output"):
        check_place(tmp_path / place)
    assert contents(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("place", ["/", "/proc"])
def test_where_a_disk_is_mounted_nothing_can_be_replaced(place):
    with pytest.raises(JobError, match="is where a disk is mounted.*choose a folder in it"):
        check_place(Path(place))


@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=1"], ids=["read-only", "full"])
def test_a_disk_that_takes_nothing_is_told_before_the_work(tmp_path, options):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(JobError, match="cannot be used .(Read-only file system|No space left on device).: choose another"):
            check_place(tmp_path / "new" / "out")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_looking_whether_a_place_can_be_written_leaves_nothing_there(tmp_path):
    check_place(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
