"""Other systems than Linux, as far as one can be Linux and pretend: what they lack is taken away, and what they say is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from vq4dit import evaluation, job
from vq4dit.job import write_atomically

ROOT = Path(__file__).parents[1]
LACKING = """
import os, runpy, sys
sys.modules.update(dict.fromkeys({missing!r}))  # importing them fails
for name in ("getuid", "fork", "register_at_fork"):
    if hasattr(os, name): delattr(os, name)
"""
QUANTIZE = """
from vq4dit.cli import main
code = main(["quantize", {model!r}, "--recipe", "kmeans", "--output", {output!r}, "--json"])
code = code or main(["compare", {model!r}, {output!r}, "--steps", "1", "--labels", "cat", "--output", {output!r} + "-c"])
sys.exit(code)
"""
EVERYTHING = """
import importlib, pkgutil, vq4dit
for module in pkgutil.walk_packages(vq4dit.__path__, "vq4dit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
found = runpy.run_path("app.py")
print(found["workspace_folder"]())
"""


def python(program: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "VQ4DIT_WORKSPACE"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_commands_work_without_what_only_unix_has(tmp_path, model_folder):
    output = tmp_path / "q"
    program = LACKING.format(missing=["fcntl", "resource", "pwd", "grp"])
    finished = python(program + QUANTIZE.format(model=model_folder, output=str(output)))
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "q-c" / "report.json").read_text())["peak_memory_bytes"] > 10**8
    assert not (tmp_path / "q.job").exists()


def test_every_module_and_the_app_can_be_imported_without_what_only_unix_has():
    finished = python(LACKING.format(missing=["fcntl", "resource"]) + EVERYTHING)
    assert finished.returncode == 0 and "vq4dit" in finished.stdout, finished.stderr


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)])
def test_where_there_is_no_proc_memory_is_counted_in_the_unit_of_the_system(monkeypatch, platform, unit):
    import resource

    monkeypatch.setattr(evaluation, "high_water_mark", lambda process: 0)
    monkeypatch.setattr(evaluation.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5_000_000))
    assert evaluation.peak_memory(SimpleNamespace(type="cpu")) == 5_000_000 * unit


def test_windows_tells_the_peak_itself(monkeypatch):
    monkeypatch.setattr(evaluation, "high_water_mark", lambda process: 0)
    memory = SimpleNamespace(rss=1, peak_wset=123)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    assert evaluation.peak_memory(SimpleNamespace(type="cpu")) == 123


def test_where_nobody_tells_the_peak_it_is_what_is_used_now(monkeypatch):
    monkeypatch.setattr(evaluation, "high_water_mark", lambda process: 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    found = evaluation.peak_memory(SimpleNamespace(type="cpu"))
    assert 0.5 < found / psutil.Process().memory_info().rss < 2


def test_a_file_that_somebody_reads_on_windows_is_replaced_a_moment_later(tmp_path, monkeypatch):
    refused = iter([PermissionError(13, "used by another process")] * 2)
    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if error := next(refused, None):
            raise error
        return replace(path, target)

    monkeypatch.setattr(job, "WINDOWS", True)
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
