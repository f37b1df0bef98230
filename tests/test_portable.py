"""Other systems than Linux, as far as one can be Linux and pretend: what they lack is taken away, and what they say is said."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vq4dit import memory
from vq4dit.disk import files
from vq4dit.disk.files import write_atomically


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_where_there_is_no_proc_memory_is_counted_in_the_unit_of_the_system(monkeypatch, platform, unit):
    import resource

    monkeypatch.setattr(memory, "high_water_mark", lambda process: 0)
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5_000_000))
    assert memory.peak_memory(torch.device("cpu")) == 5_000_000 * unit


def test_windows_tells_the_peak_itself(monkeypatch):
    monkeypatch.setattr(memory, "high_water_mark", lambda process: 0)
    told = SimpleNamespace(rss=1, peak_wset=123)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: told)
    assert memory.peak_memory(torch.device("cpu")) == 123


def test_where_nobody_tells_the_peak_it_is_what_is_used_now(monkeypatch):
    monkeypatch.setattr(memory, "high_water_mark", lambda process: 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    found = memory.peak_memory(torch.device("cpu"))
    assert 0.5 < found / psutil.Process().memory_info().rss < 2


def test_a_file_that_somebody_reads_on_windows_is_replaced_a_moment_later(tmp_path, monkeypatch):
    refused = iter([PermissionError(13, "used by another process")] * 2)
    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if error := next(refused, None):
            raise error
        return replace(path, target)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(Path, "replace", replaced)
    (tmp_path / "file").write_text("old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_elsewhere_a_refusal_is_told_at_once(tmp_path, monkeypatch):
    def refused(path: Path, target: Path) -> Path:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())
