"""Whole or not at all, and nothing of anybody else's is lost."""

import errno
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vq4dit import files
from vq4dit.errors import JobError
from vq4dit.files import amount, check_free, check_place, remove_known, unknown_names, whole_folder, write_atomically

OURS = {"index", "part/weights"}


def known(folder: Path) -> set[str] | None:
    return OURS if (folder / "index").is_file() else None


def fill(folder: Path, content: str) -> Path:
    for name in sorted(OURS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


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
    with whole_folder(tmp_path / ("f" * 255), False, known) as partial:
        fill(partial, "new")
    assert contents(tmp_path / ("f" * 255)) == dict.fromkeys(OURS, "new")


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


@pytest.mark.parametrize("theirs", ["part/notes.txt", ".git/config", "lora.safetensors", "part/deep/er/x", "index.bak"])
def test_a_folder_with_somebody_elses_file_is_not_replaced_and_the_file_is_named(tmp_path, theirs):
    folder = fill(tmp_path / "out", "old")
    (folder / theirs).parent.mkdir(parents=True, exist_ok=True)
    (folder / theirs).write_text("mine")
    before = contents(folder)
    with pytest.raises(JobError, match=f"holds what is not ours and would be lost: .*{theirs}"):
        with whole_folder(folder, True, known) as partial:
            fill(partial, "new")
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(JobError, match="not empty.*--overwrite"):
        check_free(tmp_path / "out", False, known)
    with pytest.raises(JobError, match="none of our results"):
        check_free(tmp_path / "out", True, known)


def test_links_and_empty_folders_of_somebody_else_count_as_theirs(tmp_path):
    folder = fill(tmp_path / "out", "old")
    assert unknown_names(folder, OURS) == []
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "empty").mkdir()
    (folder / "part" / "weights").rename(tmp_path / "weights")
    (folder / "part" / "weights").symlink_to(tmp_path / "weights")
    assert unknown_names(folder, OURS) == ["empty", "link", "part/weights"]


def test_removing_follows_no_link(tmp_path):
    theirs = fill(tmp_path / "theirs", "mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "index").symlink_to(theirs / "index")
    (folder / "part").symlink_to(theirs / "part", target_is_directory=True)
    remove_known(folder, OURS)
    assert contents(theirs) == dict.fromkeys(OURS, "mine") and (folder / "part").is_symlink()


def test_an_error_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = fill(tmp_path / "out", "old")
    with pytest.raises(OSError, match="I/O error"):
        with whole_folder(folder, True, known) as partial:
            fill(partial, "new")
            raise OSError("I/O error")
    assert contents(tmp_path) == {f"out/{name}": "old" for name in OURS}


def test_a_disk_that_fills_up_is_told_with_what_to_do(tmp_path):
    with pytest.raises(JobError, match="the disk is full: .*out could not be written. Free some space and use --resume"):
        with whole_folder(tmp_path / "out", False, known, "use --resume"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_came_into_the_folder_meanwhile_is_not_lost(tmp_path):
    folder = fill(tmp_path / "out", "old")
    with pytest.raises(JobError, match="not ours and would be lost: notes.txt"):
        with whole_folder(folder, True, known) as partial:
            fill(partial, "new")
            (folder / "notes.txt").write_text("mine")
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "index").read_text() == "old"


CALLS = ((Path, "mkdir"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (os, "fsync"), (files, "_exchange"))


def replace_until(folder: Path, moment: int, exchange: bool) -> int:
    """Replace a folder in a process of its own, killed before or after its n-th change of the disk; how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def dying(change):
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            if count == moment // 2 and moment % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*arguments, **options)
            if count == moment // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    try:
        if not exchange:
            files._exchange = lambda one, other: False
        for owner, name in CALLS:
            setattr(owner, name, dying(getattr(owner, name)))
        with whole_folder(folder, True, known) as partial:
            fill(partial, "new")
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_killed_at_any_moment_the_old_folder_or_the_new_one_is_there(tmp_path, exchange):
    old, new = dict.fromkeys(OURS, "old"), dict.fromkeys(OURS, "new")
    moment, ended = 2, -9
    while ended != 0:
        around = tmp_path / str(moment)
        folder = fill(around / "out", "old")
        ended = replace_until(folder, moment, exchange)
        assert ended in (0, -9)
        found = [contents(path) for path in around.iterdir()]
        if exchange and os.uname().sysname == "Linux":
            assert contents(folder) in (old, new)
        assert old in found or new in found  # in two steps there is a moment at which both have hidden names
        moment += 1
    assert contents(folder) == new and [path.name for path in around.iterdir()] == ["out"] and moment > 20


# --- the last step ---


@pytest.fixture
def overlay(tmp_path):
    """A folder whose content lies in a lower layer, as in a container: folders there cannot be renamed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = []
    try:
        for arguments in (
            ["-t", "tmpfs", "tmpfs", disk],
            ["-t", "overlay", "-o", f"lowerdir={disk}/low,upperdir={disk}/up,workdir={disk}/work", "overlay", disk / "seen"],
        ):
            made = subprocess.run(["mount", *arguments], capture_output=True)
            if made.returncode:
                pytest.skip(f"cannot mount an overlay here: {made.stderr.decode().strip()}")
            mounted.append(arguments[-1])
            if arguments[-1] == disk:
                fill(disk / "low" / "full", "old")
                (disk / "low" / "picture").write_text("old")
                for name in ("low/empty", "up", "work", "seen"):
                    (disk / name).mkdir()
        yield disk / "seen"
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", place], check=True)


def test_a_folder_that_no_rename_can_replace_is_told_before_the_work(overlay):
    with pytest.raises(JobError, match=r"full cannot be replaced \(Invalid cross-device link\): choose another output"):
        check_place(overlay / "full")
    for name in ("empty", "picture", "new", "new/out"):
        check_place(overlay / name)
    check_place(overlay / "full", replaced=False)
    assert contents(overlay) == {"full/index": "old", "full/part/weights": "old", "picture": "old"}
    with whole_folder(overlay / "empty", False, known) as partial:
        fill(partial, "new")
    assert contents(overlay / "empty") == dict.fromkeys(OURS, "new")


def test_what_another_user_owns_in_a_sticky_folder_is_told_before_the_work(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        fill(folder / "theirs", "old")
        (folder / "picture").write_text("old")
        os.seteuid(65534)
        try:
            for theirs in ("theirs", "picture"):
                with pytest.raises(JobError, match=rf"{theirs} cannot be replaced \(Operation not permitted\): choose another"):
                    check_place(folder / theirs)
            check_place(folder / "mine")
        finally:
            os.seteuid(0)
        assert contents(folder) == {"theirs/index": "old", "theirs/part/weights": "old", "picture": "old"}


@pytest.mark.parametrize("flag", ["a", "i"], ids=["append-only", "immutable"])
def test_a_folder_that_keeps_its_names_is_told_before_the_work(tmp_path, flag):
    folder = tmp_path / "kept"
    fill(folder / "out", "old")
    if subprocess.run(["chattr", f"+{flag}", folder], capture_output=True).returncode:
        pytest.skip("this system has no such folders")
    try:
        for name in ("out", "new"):
            with pytest.raises(JobError, match=r"cannot be (used|replaced) \(Operation not permitted\): choose another output"):
                check_place(folder / name)
    finally:
        subprocess.run(["chattr", f"-{flag}", folder], check=True)
    assert contents(folder / "out") == dict.fromkeys(OURS, "old")


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_what_is_finished_is_kept_where_only_the_last_step_fails(tmp_path, monkeypatch, there):
    def refused(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    before = contents(fill(tmp_path / "out", "old")) if there else {}
    monkeypatch.setattr(files, "_take_place", refused)
    with pytest.raises(
        JobError, match=r"cannot be put at .*out \(Invalid cross-device link\). What was made is whole and lies in "
    ) as told:
        with whole_folder(tmp_path / "out", True, known) as partial:
            fill(partial, "new")
    (kept,) = tmp_path.glob("out-finished-*")
    assert contents(kept) == dict.fromkeys(OURS, "new") and f"lies in {kept}: move it" in str(told.value)
    assert not list(tmp_path.glob(".*")) and (not there or contents(tmp_path / "out") == before)


def test_what_is_finished_is_kept_where_somebody_elses_file_came_into_its_place(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(JobError, match="would be lost: mine.* What was made is whole and lies in .*out-finished-"):
        with whole_folder(tmp_path / "out", True, known) as partial:
            fill(partial, "new")
            (tmp_path / "out" / "mine").write_text("mine")
    (kept,) = tmp_path.glob("out-finished-*")
    assert contents(kept) == dict.fromkeys(OURS, "new") and (tmp_path / "out" / "mine").exists()


# --- words ---


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.ENOSPC])
def test_nobody_reads_a_name_that_only_we_know(tmp_path, monkeypatch, number):
    def fails(descriptor):
        raise OSError(number, os.strerror(number), str(next(tmp_path.rglob(".vq4dit-*"))))

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises((JobError, OSError)) as told:
        write_atomically(tmp_path / "note", b"new")
    assert ".vq4dit-" not in str(told.value) and "note" in str(told.value)
    with pytest.raises(JobError) as told:
        with whole_folder(tmp_path / "out", False, known) as partial:
            write_atomically(partial / "weights", b"new")
    assert ".vq4dit-" not in str(told.value) and f"{tmp_path / 'out' / 'weights'}" in str(told.value)
    with pytest.raises(JobError) as told:
        with whole_folder(tmp_path / "out", False, known) as partial:
            raise OSError(number, os.strerror(number), str(partial / "weights"))
    assert ".vq4dit-" not in str(told.value) and "out" in str(told.value) and not list(tmp_path.iterdir())


def test_weights_that_safetensors_cannot_write_are_told(tmp_path):
    with pytest.raises(JobError, match="out could not be written .Error .*os error 2.*: mend that and try again"):
        with whole_folder(tmp_path / "out", False, known) as partial:
            save_file({"x": torch.zeros(1)}, partial / "missing" / "weights")


def test_a_disk_that_can_hold_no_more_files_is_not_called_full_of_bytes(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=3", "t", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(JobError, match="the disk can hold no more files .its inodes are used up.: .*c needs 7 bytes"):
            for name in "abc":
                write_atomically(tmp_path / name, b"content")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
