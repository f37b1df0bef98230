"""Asks the command server to run a command, and judges how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # escapes, bidi marks


class Complaint(NamedTuple):
    """What a case found: which of the counted kinds, and the details."""

    kind: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int  # negative: the signal that ended it
    hung: bool
    seconds: float
    growth: int  # bytes of memory beyond those of the server
    changes: int  # to the file system, below the home
    output: str  # standard output and standard error

    def complaints(self, codes: Collection[int] = (0, 1), growth: int | None = None) -> Iterator[Complaint]:
        """What is wrong with the ending of any command whatsoever.

        Args:
            codes: with which it may exit.
            growth: how much memory it may take, in bytes.
        """
        if self.hung:
            yield Complaint("hangs", f"killed after {self.seconds:.0f} s")
        elif "Traceback (most recent call last)" in self.output:
            yield Complaint("tracebacks", self.output.strip().splitlines()[-1][:300])
        elif self.code not in codes:
            yield Complaint("wrong exit codes", f"{self.code}, not {sorted(codes)}: {self.output.strip()[-500:]}")
        elif self.code == 1:
            yield from self._paragraph()
        if growth is not None and self.growth > growth:
            yield Complaint("large allocations", f"{self.growth / 1e6:.0f} MB, allowed are {growth / 1e6:.0f} MB")
        if found := CONTROL.search(self.output):
            yield Complaint("control characters", f"{found[0]!r} in {self.output[:300]!r}")

    def _paragraph(self) -> Iterator[Complaint]:
        text = self.output.partition("error:")[2].strip()
        if not text or "\n" in text:
            yield Complaint("no paragraph", f"{self.output.strip()[:500]!r}")


class Worker:
    """A connection to the server: one command at a time."""

    def __init__(self, folder: Path):
        self.folder = folder  # of the models
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(folder / "socket"))
        self._lines = self._socket.makefile("rw")

    def run(
        self,
        home: Path,
        call: str,
        *arguments: object,
        seconds: float = 10.0,
        die_at: int = 0,
        die_with: int = signal.SIGKILL,
        kill_after: float = 0.0,
        as_nobody: bool = False,
    ) -> Outcome:
        """Run one of `tiny_models.CALLS` in the folder `home`.

        Args:
            seconds: of one core, after which it hangs.
            die_at: right before which change of the file system it gets the signal `die_with`; 0 is never.
            kill_after: seconds until it is killed; 0 is never.
        """
        request = {
            "home": str(home),
            "log": str(home.with_name(f"{home.name}.log")),
            "call": call,
            "arguments": [str(argument) if isinstance(argument, Path) else argument for argument in arguments],
            "seconds": seconds,
            "die_at": die_at,
            "die_with": int(die_with),
            "kill_after": kill_after,
            "as_nobody": as_nobody,
        }
        print(json.dumps(request), file=self._lines, flush=True)
        return Outcome(**json.loads(self._lines.readline()))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def environment() -> dict[str, str]:
    """Of all processes: they import this checkout, or what PYTHONPATH says, and ask no network."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS.parent), str(TESTS / "support")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@contextmanager
def command_server() -> Iterator[Path]:
    """A server with fresh models; gives their folder, in which `Worker`s find its socket."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("command_server.py"))]
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # commands may run as somebody else
        with open(folder / "server.log", "w") as log:
            server = subprocess.Popen([*command, folder], stdout=subprocess.PIPE, stderr=log, env=environment(), text=True)
            try:
                for line in server.stdout:
                    if line == "ready\n":
                        break
                else:
                    raise RuntimeError(f"the server did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
                yield folder
            finally:
                server.kill()
                server.wait()
