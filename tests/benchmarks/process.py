"""Run a command as a whole process and take its own figures from the operating system (Linux)."""

import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from vq4dit.memory import high_water_mark

POLL_SECONDS = 0.05


class Measured(NamedTuple):
    """`peak_bytes` is the process's largest resident memory, as the system counts it, last read when it was about to end."""

    printed: str
    seconds: float
    peak_bytes: int


def run_vq4dit(*arguments: str) -> Measured:
    """`python -m vq4dit ARGUMENTS`.

    Raises:
        RuntimeError: if the command fails; what it said is on standard error.
    """
    return run([sys.executable, "-W", "ignore", "-m", "vq4dit", *arguments])


def run(command: list[str]) -> Measured:
    """As `run_vq4dit`, for any command."""
    peak_bytes = 0
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, high_water_mark(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(printed, seconds, peak_bytes)
