"""`python app.py` as a process of its own, on loopback, with a workspace of its own."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HOME = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the same number of threads gives the same bytes


def hear() -> None:
    """In a new process: listen to Ctrl-C and the end of a terminal, to which background jobs of a shell are deaf."""
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


class AppServer:
    """Started on entering, stopped on leaving; `kill` is SIGKILL, `start` again goes on with the same workspace."""

    def __init__(self, workspace: Path, *arguments: str, program: str = "app.py", **environment: str):
        self.workspace, self.arguments, self.program = workspace, arguments, program
        self.port = free_port()
        self.log = workspace.with_suffix(".log")
        self.environment = {
            **os.environ,
            **QUIET,
            "VQ4DIT_WORKSPACE": str(workspace),
            "GRADIO_TEMP_DIR": str(workspace.with_suffix(".served")),
            **environment,
        }
        self.seconds_to_start = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> AppServer:
        started = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, self.program, "--port", str(self.port), *self.arguments],
                cwd=HOME,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=hear,
            )
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - started < 120, "the app does not answer"
            time.sleep(0.1)
        self.seconds_to_start = time.monotonic() - started
        return self

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(self.url, timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As a power cut would, with all the workers it forked."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> AppServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def weights(folder: Path) -> bytes:
    (path,) = (folder / "transformer").glob("*.safetensors")
    return path.read_bytes()


@functools.cache
def made_by_the_command(model: str, *options: str) -> bytes:
    """The weights that the command shown by the page makes of the same settings, never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "made"
        command = [sys.executable, "-m", "vq4dit", "quantize", model, *options, "--output", str(output)]
        subprocess.run(command, cwd=HOME, env={**os.environ, **QUIET}, check=True, capture_output=True)
        return weights(output)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
