"""Progress where nobody looks at a terminal: plain lines, now and then."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vq4dit.cli import bars
from vq4dit.cli.bars import ProgressLines, progress_bars
from vq4dit.progress import Progress

ROOT = Path(__file__).parents[2]
ESCAPE = "\x1b"


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        seconds = 100.0

    monkeypatch.setattr(bars.time, "monotonic", lambda: Clock.seconds)
    return Clock


def test_a_line_tells_stage_counter_and_time_left(clock):
    lines = ProgressLines((file := io.StringIO()).write)
    lines.tell()  # nothing is known yet
    lines.show(Progress("fit", 0, 40))
    lines.tell()
    clock.seconds += 20
    lines.show(Progress("fit", 4, 40, {"error": 0.1234}))
    lines.tell()
    assert file.getvalue().splitlines() == ["fitting layers: 0/40", "fitting layers: 4/40, about 3 min left, error 0.123"]


def test_the_time_left_of_a_resumed_job_does_not_count_what_was_done_before(clock):
    lines = ProgressLines((file := io.StringIO()).write)
    lines.show(Progress("cluster", 30, 40))
    clock.seconds += 10
    lines.show(Progress("cluster", 35, 40))
    lines.tell()
    assert file.getvalue() == "clustering layers: 35/40, about 10 s left\n"


def test_every_stage_ends_with_one_line_of_its_own(clock):
    lines = ProgressLines((file := io.StringIO()).write)
    for stage in ("cluster", "calibrate", "calibrate"):
        for done in (0, 1, 2, 2):
            lines.show(Progress(stage, done, 2))
            clock.seconds += 30
    assert file.getvalue().splitlines() == ["clustering layers: 2/2, 60 s", *["calibrating: 2/2, 60 s"] * 2]


def test_bytes_are_told_in_megabytes(clock):
    lines = ProgressLines((file := io.StringIO()).write)
    lines.show(Progress("upload", 2_500_000, 10_000_000))
    lines.tell()
    assert file.getvalue() == "uploading: 2.5/10.0 MB\n"


def test_a_line_comes_though_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())  # here: between fixture and test pytest sets its own again
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.05)
    with progress_bars() as on_progress:
        on_progress(Progress("fit", 1, 3))
        end = time.monotonic() + 30
        while log.getvalue().count("\n") < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert set(log.getvalue().splitlines()) == {"fitting layers: 1/3"}
    told = log.getvalue()
    time.sleep(0.2)
    assert log.getvalue() == told  # the clock stopped with the work


def test_lines_hold_no_control_characters_whatever_colours_are_forced(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bars() as on_progress:
        on_progress(Progress("sample", 1, 1))
    assert ESCAPE not in log.getvalue() and "\r" not in log.getvalue() and log.getvalue().startswith("sampling: 1/1")


PROGRAM = """
from vq4dit.progress import Progress
from vq4dit.cli.bars import progress_bars
with progress_bars() as on_progress:
    for done in range(4):
        on_progress(Progress("fit", done, 3))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo terminals")
def test_a_terminal_has_bars():
    mine, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(mine, 1000):
                seen += chunk
        except OSError:  # the other side is closed
            pass
    os.close(mine)
    assert process.returncode == 0 and b"\x1b[" in seen and "fitting layers" in seen.decode() and b"3/3" in seen


def test_a_command_in_a_pipe_says_nothing_but_our_own_plain_lines(tmp_path, model_folder):
    """No bars of other libraries, none of their remarks; figures alone on standard output."""
    command = [sys.executable, "-m", "vq4dit"]
    quantized = tmp_path / "q"
    for arguments, lines in (
        (["inspect", model_folder, "--json"], 0),
        (["quantize", model_folder, "--recipe", "kmeans", "--output", quantized, "--json"], 2),
        (["sample", quantized, "--labels", "cat", "--steps", "1", "--output", tmp_path / "x.png", "--json"], 2),
        (["compare", model_folder, quantized, "--labels", "cat", "--steps", "1", "--output", tmp_path / "c", "--json"], 3),
    ):
        finished = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True)
        assert finished.stdout.startswith("{") and finished.stdout.endswith("}\n")
        ours = re.compile(r"(device: |(clustering layers|sampling|measuring the noise): \d+/\d+).*")
        assert all(ours.fullmatch(line) for line in finished.stderr.splitlines()), finished.stderr
        assert len(finished.stderr.splitlines()) >= lines and ESCAPE not in finished.stderr
