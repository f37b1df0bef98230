"""What was asked for is done, whatever became of the streams on which a command speaks."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.main import main
from vq4dit.cli.streams import Patient
from vq4dit.errors import VQ4DiTError
from vq4dit.progress import Progress

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


class Broken(io.TextIOBase):
    """A stream whose reader is gone."""

    def __init__(self, error: Exception):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: self.write("")


def started(redirection: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A command as a shell starts it."""
    command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "vq4dit", *arguments))
    return subprocess.run(
        f"exec {command} {redirection}",
        shell=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
    )


def sampling(model, output) -> list[object]:
    return ["sample", model, "--labels", "cat", "--steps", 1, "--output", output]


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", pytest.param(">/dev/full 2>/dev/full", marks=needs_dev_full)])
def test_a_command_finishes_without_its_streams(tmp_path, model_folder, redirection):
    done = started(redirection, *sampling(model_folder, tmp_path / "x.png"))
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@needs_dev_full
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_a_report_that_cannot_be_written_is_no_failure_of_what_was_saved(tmp_path, model_folder, more):
    done = started(">/dev/full", *sampling(model_folder, tmp_path / "x.png"), *more)
    said = done.stderr.decode()
    assert done.returncode == 0 and "the work is done and saved; only its report could not be told (" in said
    assert "error:" not in said and "Exception ignored" not in said and (tmp_path / "x.png").exists()


@needs_dev_full
def test_figures_that_are_all_that_was_asked_for_and_cannot_be_told_are_a_failure(model_folder):
    done = started(">/dev/full", "inspect", model_folder)
    assert done.returncode == 1 and b"error: the figures could not be told (" in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["inspect"], ["--help"]], ids=" ".join)
def test_a_reader_who_has_seen_enough_is_not_told_of_it(model_folder, arguments):
    model = [] if arguments == ["--help"] else [model_folder]
    done = started("| true", arguments[0], *model, *arguments[1:])
    assert done.returncode == 0 and done.stderr == b""


def test_letters_that_a_terminal_does_not_have_are_shown_by_their_codes(tmp_path, model_folder):
    done = started("", *sampling(model_folder, tmp_path / "猫é.png"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"\\u732b\\xe9.png:1images" in b"".join(done.stdout.split())
    assert b"Traceback" not in done.stderr and b"error" not in done.stderr


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")], ids=repr)
def test_work_goes_on_though_nobody_hears_of_it(tmp_path, model_folder, monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with progress_bars() as on_progress:
        on_progress(Progress("fit", 3, 3))
    assert main([str(word) for word in sampling(model_folder, tmp_path / "x.png")]) == 0
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1


def test_without_a_stream_there_is_nothing_to_fail():
    nowhere = Patient(None)
    assert nowhere.write("x") == 1 and not nowhere.isatty() and nowhere.encoding == "utf-8"
    nowhere.flush()


@pytest.mark.parametrize(
    "error", [VQ4DiTError("the report is wrong"), MemoryError(), OSError("gone"), RuntimeError("x")], ids=repr
)
def test_whatever_fails_after_the_save_is_told_as_what_it_is(tmp_path, model_folder, capsys, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("vq4dit.cli.quantize.layer_errors", fails)
    assert main(["quantize", model_folder, "--recipe", "kmeans", "--output", str(tmp_path / "q")]) == 0
    said = capsys.readouterr().err
    assert "the work is done and saved; only its report could not be told" in said and "error:" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
