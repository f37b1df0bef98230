"""One at a time, let go of by death, and free for all who only look."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vq4dit.disk import locks
from vq4dit.disk.locks import lock, locked, unlock

HOLDER = """
import pathlib, sys, time
from vq4dit.disk.locks import lock
held = lock(pathlib.Path(sys.argv[1]))
print("mine", flush=True)
time.sleep(60)
"""


def test_a_lock_is_had_by_one_and_then_by_the_next(tmp_path):
    first = lock(tmp_path / "lock")
    assert first is not None and lock(tmp_path / "lock") is None
    unlock(first)
    unlock(first)  # once more does no harm
    second = lock(tmp_path / "lock")
    assert second is not None
    unlock(second)


def test_who_waits_gets_it_when_it_is_let_go_of(tmp_path):
    held = lock(tmp_path / "lock")
    threading.Timer(0.2, unlock, [held]).start()
    with locked(tmp_path / "lock", patience=30.0) as is_mine:
        assert is_mine


def test_a_lock_file_stays_and_says_nothing(tmp_path):
    (tmp_path / "lock").write_text("left by an earlier version")
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == "left by an earlier version"
    with locked(tmp_path / "new"):
        pass
    assert (tmp_path / "new").read_bytes() == b""


def test_many_who_only_look_all_see_that_it_is_free(tmp_path):
    def look(_: int) -> bool:
        with locked(tmp_path / "lock", patience=5.0) as is_free:
            return is_free

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(look, range(200)))


def test_the_system_lets_go_of_a_killed_process_lock(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        assert lock(tmp_path / "lock") is None
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path / "lock", patience=5.0) as is_mine:
        assert is_mine


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_work_goes_on(tmp_path, monkeypatch, error):
    """A network drive without them; a Python without `fcntl`."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    monkeypatch.setattr(locks, "unlock_descriptor", refuse)
    with locked(tmp_path / "lock") as is_mine:
        assert is_mine


def test_other_failures_are_told(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with pytest.raises(OSError, match="the disk is broken"):
        lock(tmp_path / "lock")
