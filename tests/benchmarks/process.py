"""Run a command as a whole process and take its own figures from the operating system."""

import os
import subprocess
import sys
import time
from typing import NamedTuple


class Measured(NamedTuple):
    """`peak_bytes` is the process's largest resident memory."""

    printed: str
    seconds: float
    peak_bytes: int


def run_vq4dit(*arguments: str) -> Measured:
    """`python -m vq4dit ARGUMENTS`.

    Raises:
        RuntimeError: if the command fails; what it said is on standard error.
    """
    command = [sys.executable, "-W", "ignore", "-m", "vq4dit", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(printed, time.monotonic() - started, usage.ru_maxrss * 1024)
