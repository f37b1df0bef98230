"""Runs commands of vq4dit, each in a process of its own that takes no time to start.

Importing torch and diffusers takes seconds, a fork of a process that has done so takes 20 ms: this one imports everything,
makes the models that all cases begin with, and then forks for every connection to its socket, and there for every command.
A command can be told to die at its n-th change to the file system, or after some seconds, or to run as somebody without
rights. It is killed when it hangs, gets an error from the system when it takes gigabytes, and its memory is measured.
"""

import json
import math
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

import tiny_models
import tqdm

ADDRESS_SPACE = 3 * 2**30  # that a command may add to what the server has: behind it, allocating fails
PATIENCE = 3  # seconds for each second that a command may take: other processes want to run as well
NOBODY = 65534
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}  # and "open" to write


def main() -> None:
    folder = Path(sys.argv[1])
    tqdm.tqdm.monitor_interval = 0  # no threads: they would not live on in a fork
    tiny_models.make_models(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # connections end by themselves
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection)
                os._exit(0)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run one command for each line of JSON, until the other side hangs up."""
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            print(json.dumps(run(json.loads(line))), file=lines, flush=True)


def run(request: dict) -> dict:
    changes = mmap.mmap(-1, 8)  # how many there were, told by the child while it lives
    before = resident_bytes()
    started = time.monotonic()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    child = os.fork()
    if not child:
        os._exit(work(request, log, changes))
    os.close(log)
    deadline = started + PATIENCE * request["seconds"]
    moment = started + request["kill_after"] if request["kill_after"] else deadline
    hung = False
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > moment:
            hung = moment == deadline
            os.kill(child, signal.SIGKILL)
            ended = os.wait4(child, 0)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    return {
        "code": code,
        "hung": hung or code == -signal.SIGXCPU,
        "seconds": time.monotonic() - started,
        "growth": ended[2].ru_maxrss * 1024 - before,
        "changes": struct.unpack("q", changes[:])[0],
        "output": Path(request["log"]).read_text(errors="replace"),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(request: dict, log: int, changes: mmap.mmap) -> int:
    """The forked process: returns what the interpreter would exit with."""
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["home"])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + ADDRESS_SPACE] * 2)
    resource.setrlimit(resource.RLIMIT_CPU, [math.ceil(request["seconds"])] * 2)
    resource.setrlimit(resource.RLIMIT_CORE, [0, 0])
    if request["as_nobody"] and not os.getuid():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    count_changes(request["home"], request["die_at"], request["die_with"], changes)
    try:
        code = tiny_models.CALLS[request["call"]](*request["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def count_changes(home: str, die_at: int, die_with: int, changes: mmap.mmap) -> None:
    """Count what Python changes below `home`, and get a signal right before the change of that number."""
    count = 0

    def seen(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (event in CHANGES or writes):
            return
        path = arguments[0]
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if os.path.isabs(path) and not path.startswith(home):
            return
        count += 1
        changes[:] = struct.pack("q", count)
        if count == die_at:
            os.kill(os.getpid(), die_with)

    sys.addaudithook(seen)


if __name__ == "__main__":
    main()
