"""A folder is whole or not at all, and nothing in it that is not ours is lost: not by a change, not at the last moment."""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vq4dit.disk import folders
from vq4dit.disk.files import check_place, write_atomically
from vq4dit.disk.folders import check_free, remove_recorded, sweep, unknown_names, whole_folder
from vq4dit.disk.locks import locked
from vq4dit.disk.record import RECORD, recorded, write_record
from vq4dit.errors import JobError, LeftBehind

OURS = {"index", "part/weights"}
MODES = pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])


def fill(folder: Path, content: str) -> Path:
    for name in sorted(OURS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def write(folder: Path, content: str, overwrite: bool = False, **more) -> Path:
    with whole_folder(folder, overwrite, "index", **more) as new:
        fill(new, content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Of everything but records."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_has_a_record_and_can_be_replaced(tmp_path):
    write(tmp_path / "out", "old")
    assert recorded(tmp_path / "out").keys() == OURS
    write(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path / "out") == dict.fromkeys(OURS, "new") and names(tmp_path) == {"out"}


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    write(tmp_path / ("f" * 255), "old")
    write(tmp_path / ("f" * 255), "new", overwrite=True)
    assert contents(tmp_path / ("f" * 255)) == dict.fromkeys(OURS, "new")


@pytest.mark.parametrize("theirs", ["part/notes.txt", ".git/config", "lora.safetensors", "part/deep/er/x", "index.bak"])
def test_a_folder_with_somebody_elses_file_is_not_replaced_and_the_file_is_named(tmp_path, theirs):
    folder = write(tmp_path / "out", "old")
    (folder / theirs).parent.mkdir(parents=True, exist_ok=True)
    (folder / theirs).write_text("mine")
    before = contents(folder)
    with pytest.raises(JobError, match=f"holds what is not ours and would be lost: .*{theirs}"):
        write(folder, "new", overwrite=True)
    assert contents(folder) == before and names(tmp_path) == {"out"}


@pytest.mark.parametrize("name", sorted(OURS))
@pytest.mark.parametrize("content", ["dlo", "my own", ""], ids=["as long", "longer", "empty"])
def test_a_file_under_our_name_that_we_did_not_write_so_is_somebody_elses(tmp_path, name, content):
    folder = write(tmp_path / "out", "old")
    (folder / name).write_text(content)
    with pytest.raises(
        JobError, match=f"would be lost: {name} .changed since it was written.. Move it away, or choose another"
    ):
        check_free(folder, True, "index")
    assert (folder / name).read_text() == content


def change_record(folder: Path) -> None:
    (folder / RECORD).write_text((folder / RECORD).read_text().replace('"seal"', '"note": "mine",\n "seal"'))


@pytest.mark.parametrize(
    "lose",
    [
        change_record,
        lambda folder: (folder / RECORD).write_text((folder / RECORD).read_text() + "\n"),
        lambda folder: (folder / RECORD).write_text('{"settings": {}}'),
        lambda folder: (folder / RECORD).unlink(),
        lambda folder: (
            (folder / RECORD).rename(folder.parent / "record"),
            (folder / RECORD).symlink_to(folder.parent / "record"),
        ),
    ],
    ids=["edited", "a line added", "of an earlier version", "gone", "a link"],
)
def test_a_folder_whose_record_does_not_fit_is_not_replaced(tmp_path, lose):
    folder = write(tmp_path / "out", "old")
    lose(folder)
    with pytest.raises(JobError, match="is none of our results.*choose another output"):
        write(folder, "new", overwrite=True)
    assert contents(folder) == dict.fromkeys(OURS, "old")


def test_folders_of_one_kind_do_not_replace_those_of_another(tmp_path):
    folder = write(tmp_path / "out", "old")
    with pytest.raises(JobError, match="none of our results and is not replaced"):
        check_free(folder, True, "report.json")


def test_a_file_that_is_missing_is_no_loss(tmp_path):
    folder = write(tmp_path / "out", "old")
    (folder / "part" / "weights").unlink()
    write(folder, "new", overwrite=True)
    assert contents(folder) == dict.fromkeys(OURS, "new")


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(JobError, match="not empty.*--overwrite"):
        check_free(tmp_path / "out", False, "index")
    with pytest.raises(JobError, match="none of our results"):
        check_free(tmp_path / "out", True, "index")


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
    folder = write(tmp_path / "out", "mine")
    for name in OURS:
        (folder / name).unlink()
    (folder / "part").rmdir()
    (folder / "index").symlink_to(theirs / "index")
    (folder / "part").symlink_to(theirs / "part", target_is_directory=True)
    assert remove_recorded(folder) == ["index", "part"]
    assert contents(theirs) == dict.fromkeys(OURS, "mine") and (folder / "part").is_symlink()


def test_an_error_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    folder = write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="I/O error"):
        with whole_folder(folder, True, "index") as partial:
            fill(partial, "new")
            raise OSError("I/O error")
    assert contents(tmp_path) == {f"out/{name}": "old" for name in OURS}


def test_a_disk_that_fills_up_is_told_with_what_to_do(tmp_path):
    with pytest.raises(JobError, match="the disk is full: .*out could not be written. Free some space and use --resume"):
        with whole_folder(tmp_path / "out", False, "index", "use --resume"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_files_have_the_rights_that_new_files_have(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out", False, "index") as new:
            fill(new, "new")
            (new / "part" / "weights").chmod(0o600)  # as safetensors writes them
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o640}


# --- what comes at the last moment ---


def test_what_came_into_the_folder_meanwhile_is_not_lost(tmp_path):
    folder = write(tmp_path / "out", "old")
    with pytest.raises(JobError, match="not ours and would be lost: notes.txt"):
        with whole_folder(folder, True, "index") as partial:
            fill(partial, "new")
            (folder / "notes.txt").write_text("mine")
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "index").read_text() == "old"


LATE = {
    "a new file": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a new folder": lambda folder: ((folder / "mine").mkdir(), (folder / "mine" / "x").write_text("mine")),
    "a changed file": lambda folder: (folder / "index").write_text("mine"),
    "a changed record": lambda folder: ((folder / "notes.txt").write_text("mine"), (folder / RECORD).write_text("mine")),
}


@MODES
@pytest.mark.parametrize("scratch", [False, True], ids=["beside", "in a job"])
@pytest.mark.parametrize("end", [None, KeyboardInterrupt], ids=["goes on", "interrupted"])
@pytest.mark.parametrize("late", LATE.values(), ids=LATE.keys())
def test_what_comes_between_the_last_look_and_the_swap_is_kept_and_told(tmp_path, monkeypatch, late, end, scratch, exchange):
    folder = write(tmp_path / "out", "old")
    (tmp_path / "job").mkdir()
    take_place, swap = folders._take_place, folders._exchange

    def slow(work: Path, target: Path) -> None:
        late(target)
        take_place(work, target)
        if end:
            raise end

    monkeypatch.setattr(folders, "_take_place", slow)
    monkeypatch.setattr(folders, "_exchange", swap if exchange else lambda one, other: False)
    more = {"scratch": tmp_path / "job"} if scratch else {}
    with pytest.warns(
        LeftBehind, match="out was replaced, and what was in it and is not ours.*is now in .*vq4dit-kept-"
    ) as told:
        if end:
            with pytest.raises(end):
                write(folder, "new", overwrite=True, **more)
        else:
            write(folder, "new", overwrite=True, **more)
    assert contents(folder) == dict.fromkeys(OURS, "new") and not list((tmp_path / "job").iterdir())
    (kept,) = names(tmp_path) - {"out", "job"}
    assert any("mine" in path.read_text() for path in (tmp_path / kept).rglob("*") if path.is_file())
    assert kept in str(told[0].message)


def test_what_comes_into_an_empty_folder_at_the_last_moment_stays(tmp_path, monkeypatch):
    take_place = folders._take_place

    def slow(work: Path, folder: Path) -> None:
        (folder / "thesis.txt").write_text("mine")
        monkeypatch.setattr(Path, "iterdir", lambda path: iter(()))
        take_place(work, folder)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(folders, "_take_place", slow)
    with pytest.raises(JobError, match="not empty.*whole and lies in .*out-finished-"):
        write(tmp_path / "out", "new")
    monkeypatch.undo()
    (kept,) = tmp_path.glob("out-finished-*")
    assert contents(tmp_path / "out") == {"thesis.txt": "mine"} and contents(kept) == dict.fromkeys(OURS, "new")


def test_what_cannot_be_deleted_is_told(tmp_path, monkeypatch):
    folder = write(tmp_path / "out", "old")
    unlink = Path.unlink

    def refuse(path: Path, **options) -> None:
        if path.name == "weights":
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(LeftBehind, match="could not be deleted, is now in .*vq4dit-kept-.*part/weights"):
        write(folder, "new", overwrite=True)
    (kept,) = names(tmp_path) - {"out"}
    assert (
        contents(tmp_path / kept) == {"part/weights": "old"}
        and recorded(tmp_path / kept)
        and contents(folder) == dict.fromkeys(OURS, "new")
    )


# --- what a killed process leaves ---

CALLS = (
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (Path, "write_bytes"),
    (os, "fsync"),
    (folders, "lock"),
    (folders, "_exchange"),
)


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
            folders._exchange = lambda one, other: False
        for owner, name in CALLS:
            setattr(owner, name, dying(getattr(owner, name)))
        write(folder, "new", overwrite=True)
        os._exit(0)
    finally:
        os._exit(1)


@MODES
def test_killed_at_any_moment_the_old_folder_or_the_new_one_is_there_and_the_next_run_tidies_up(
    tmp_path, monkeypatch, exchange
):
    monkeypatch.setattr(folders, "YOUNG_SECONDS", 0.0)
    old, new = dict.fromkeys(OURS, "old"), dict.fromkeys(OURS, "new")
    moment, ended = 2, -9
    while ended != 0:
        around = tmp_path / str(moment)
        folder = write(around / "out", "old")
        ended = replace_until(folder, moment, exchange)
        assert ended in (0, -9)
        if exchange and os.uname().sysname == "Linux":
            assert contents(folder) in (old, new)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sweep(around)
        assert contents(folder) in (old, new) and names(around) == {"out"} and not told
        moment += 1
    assert contents(folder) == new and names(around) == {"out"} and moment > 20


def abandoned(place: Path, target: Path) -> Path:
    """As a killed process leaves it."""
    work = place / ".vq4dit-0123456789abcdef.partial"
    fill(work / "new", "half")
    (work / "lock").touch()
    (work / "target").write_text(str(target))
    return work


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    work = abandoned(tmp_path, tmp_path / "other")
    with locked(work / "lock"):
        write(tmp_path / "out", "new")
        assert contents(work / "new") == dict.fromkeys(OURS, "half")
    write(tmp_path / "out", "newer", overwrite=True)
    assert names(tmp_path) == {"out"}


def test_what_another_user_left_in_a_common_folder_is_no_hindrance(tmp_path, monkeypatch):
    work = abandoned(tmp_path, tmp_path / "other")
    lock = folders.lock

    def refuse(path: Path, **options):
        if path == work / "lock":
            raise PermissionError(errno.EACCES, "Permission denied")
        return lock(path, **options)

    monkeypatch.setattr(folders, "lock", refuse)
    write(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", work.name}


def test_a_file_that_somebody_put_into_a_folder_whose_replacement_was_killed_is_kept(tmp_path):
    work, target = abandoned(tmp_path / "job", tmp_path / "out"), write(tmp_path / "out", "new")
    shutil.rmtree(work / "new")
    write_record(fill(work / "old", "old"))
    (work / "old" / "notes.txt").write_text("mine")
    with pytest.warns(LeftBehind, match="notes.txt"):
        sweep(tmp_path / "job")
    assert (tmp_path / "vq4dit-kept-01234567" / "notes.txt").read_text() == "mine"
    assert contents(target) == dict.fromkeys(OURS, "new") and not list((tmp_path / "job").iterdir())


def test_what_is_hidden_and_not_known_to_be_ours_is_told_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "YOUNG_SECONDS", 0.0)
    (tmp_path / ".vq4dit-0123456789abcdef.partial").mkdir()
    (tmp_path / ".vq4dit-0123456789abcdef.partial" / "thesis.txt").write_text("mine")
    with pytest.warns(LeftBehind, match="seems to be left by a run that was killed: delete it"):
        write(tmp_path / "out", "new")
    assert (tmp_path / ".vq4dit-0123456789abcdef.partial" / "thesis.txt").read_text() == "mine"


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
    with whole_folder(overlay / "empty", False, "index") as partial:
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

    before = contents(write(tmp_path / "out", "old")) if there else {}
    monkeypatch.setattr(folders, "_take_place", refused)
    with pytest.raises(
        JobError, match=r"cannot be put at .*out \(Invalid cross-device link\). What was made is whole and lies in "
    ) as told:
        with whole_folder(tmp_path / "out", True, "index") as partial:
            fill(partial, "new")
    (kept,) = tmp_path.glob("out-finished-*")
    assert contents(kept) == dict.fromkeys(OURS, "new") and f"lies in {kept}: move it" in str(told.value)
    assert not list(tmp_path.glob(".*")) and (not there or contents(tmp_path / "out") == before)


def test_what_is_finished_is_kept_where_somebody_elses_file_came_into_its_place(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(JobError, match="would be lost: mine.* What was made is whole and lies in .*out-finished-"):
        with whole_folder(tmp_path / "out", True, "index") as partial:
            fill(partial, "new")
            (tmp_path / "out" / "mine").write_text("mine")
    (kept,) = tmp_path.glob("out-finished-*")
    assert contents(kept) == dict.fromkeys(OURS, "new") and (tmp_path / "out" / "mine").exists()


# --- words ---


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.ENOSPC])
def test_nobody_reads_a_name_that_only_we_know(tmp_path, monkeypatch, number):
    def fails(descriptor):
        raise OSError(number, os.strerror(number), str(next(tmp_path.rglob(".vq4dit-*"))))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((JobError, OSError)) as told:
        write_atomically(tmp_path / "note", b"new")
    assert ".vq4dit-" not in str(told.value) and "note" in str(told.value)
    with pytest.raises(JobError) as told:
        with whole_folder(tmp_path / "out", False, "index") as partial:
            write_atomically(partial / "weights", b"new")
    assert ".vq4dit-" not in str(told.value) and f"{tmp_path / 'out' / 'weights'}" in str(told.value)
    with pytest.raises(JobError) as told:
        with whole_folder(tmp_path / "out", False, "index") as partial:
            raise OSError(number, os.strerror(number), str(partial / "weights"))
    assert ".vq4dit-" not in str(told.value) and "out" in str(told.value) and not list(tmp_path.iterdir())


def test_weights_that_safetensors_cannot_write_are_told(tmp_path):
    with pytest.raises(JobError, match="out could not be written .Error .*os error 2.*: mend that and try again"):
        with whole_folder(tmp_path / "out", False, "index") as partial:
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
