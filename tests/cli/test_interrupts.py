"""Ctrl-C ends every command and the app with code 130 and without a traceback: early, late, and pressed twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app_server import HOME, AppServer, hear

from vq4dit.interrupts import leave_at_once, raise_once, was_pressed

COMMANDS = {
    "inspect": ["assets/emoji-dit"],
    "quantize": ["assets/emoji-dit", "--output", "OUT"],
    "sample": ["assets/emoji-dit", "--labels", "rocket", "--output", "OUT.png"],
    "compare": ["assets/emoji-dit", "assets/emoji-dit", "--output", "OUT"],
    "push": ["OUT"],
}


def start(*command: str, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=HOME,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear,
        **settings,
    )


def pressed(process: subprocess.Popen, times: int = 1) -> str:
    """Ctrl-C, and what the process says; it must end at once."""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "KeyboardInterrupt" not in said, said
    return said


def wait_for_import(process: subprocess.Popen, module: str) -> None:
    """Read what `-X importtime` tells until a module was imported."""
    for line in process.stderr:
        if line.rstrip().endswith(module):
            return
    raise AssertionError(f"{module} was not imported")


@pytest.mark.parametrize("command", COMMANDS)
def test_during_the_imports_every_command_leaves_quietly(command, tmp_path):
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]]
    process = start("-X", "importtime", "-m", "vq4dit", command, *arguments)
    wait_for_import(process, "torch.version")  # far from the last of torch
    pressed(process)
    assert list(tmp_path.iterdir()) == []


def test_during_the_imports_the_app_leaves_quietly(tmp_path):
    process = start("-X", "importtime", "app.py", "--port", "0")
    wait_for_import(process, "torch.version")
    pressed(process, times=2)


def test_pressed_twice_while_it_works(tmp_path):
    process = start("-W", "ignore", "-m", "vq4dit", "quantize", "assets/emoji-dit", "--output", str(tmp_path / "q"))
    while not list(tmp_path.glob("q.job/*")) and process.poll() is None:
        time.sleep(0.05)
    pressed(process, times=2)
    assert not (tmp_path / "q").exists()


ENDING = """
import signal, sys, time
from pathlib import Path
from vq4dit.interrupts import leave_at_once, raise_at_the_end, raise_once
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
raise_once()
raise_at_the_end()
from vq4dit.cli import main as cli
def write(args):
    from vq4dit.disk.folders import whole_folder
    with whole_folder(Path(sys.argv[1]), False, "index") as new:
        (new / "index").write_text("half")
        print("ready", flush=True)
        time.sleep(3 if sys.argv[2] == "deaf" else 60)
    return lambda: None
cli.inspect_command = write
sys.exit(cli.main(["inspect", "x"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str)
def test_whoever_asks_a_command_to_end_finds_nothing_half_written(tmp_path, number, code):
    process = start("-W", "ignore", "-c", ENDING, str(tmp_path / "out"), "")
    assert process.stdout.readline() == "ready\n" and list(tmp_path.iterdir())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and said.split() == ["interrupted"] and not list(tmp_path.iterdir())


def test_a_command_that_is_to_outlive_its_terminal_does(tmp_path):
    process = start("-W", "ignore", "-c", ENDING, str(tmp_path / "out"), "deaf")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and (tmp_path / "out" / "index").exists()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3])
def test_the_app_stops_quietly(tmp_path, times):
    with AppServer(tmp_path / "jobs") as server:
        signalled = server.process
        for _ in range(times):
            signalled.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert signalled.wait(timeout=60) == 130
        assert "Traceback" not in server.log.read_text() and "KeyboardInterrupt" not in server.log.read_text()


PROGRAM = """
import signal, sys, time
sys.path.insert(0, {home!r})
sys.modules["torch"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("interrupts", {path!r})
interrupts = importlib.util.module_from_spec(spec); spec.loader.exec_module(interrupts)
interrupts.raise_once()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("first", interrupts.was_pressed(), flush=True)
    time.sleep({tidying})
sys.exit(7)
"""


@pytest.mark.parametrize(("tidying", "code"), [(0, 7), (60, 130)], ids=["the first may be answered", "the second ends it"])
def test_the_first_is_an_exception_and_the_second_the_end(tidying, code):
    path = Path(HOME) / "vq4dit" / "interrupts.py"
    process = start("-c", PROGRAM.format(home=str(HOME), path=str(path), tidying=tidying))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first True\n"
    if tidying:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == code and process.stderr.read() == ""


def test_who_is_deaf_stays_deaf():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        leave_at_once()
        raise_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not was_pressed()
    finally:
        signal.signal(signal.SIGINT, before)
