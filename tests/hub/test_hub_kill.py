"""kill -9 at ten points of a push: nothing half-finished is ever visible, and the same push again completes it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_environment import PORT

TOKEN = "hf_" + "k" * 34
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
POINTS = {
    "before the repository is created": ("POST /api/repos/create", "before", 0),
    "when it was created": ("POST /api/repos/create", "after", 0),
    "when files were announced": ("POST .*/preupload/", "after", 0),
    "before the first upload": ("PUT /lfs/", "before", 0),
    "in the middle of the first upload": ("PUT /lfs/", "receiving", 0),
    "when the first file was stored": ("PUT /lfs/", "after", 0),
    "before the second upload": ("PUT /lfs/", "before", 1),
    "before the commit": ("POST .*/commit/", "before", 0),
    "when the commit was made": ("POST .*/commit/", "after", 0),
    "while the checksums are compared": ("GET .*/tree/", "before", 0),
}


@pytest.fixture(scope="module")
def runner():
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).parents[1] / "support" / "push_runner.py"
    with subprocess.Popen(
        [sys.executable, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(path.parents[2])},
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def start(runner, folder) -> int:
    """Start a push; its process id."""
    runner.stdin.write(f"{folder} ann/tiny\n")
    runner.stdin.flush()
    return int(runner.stdout.readline())


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_push_is_completed_by_the_next_one(hub, runner, quantized_folder, point):
    hub.users[TOKEN] = hub.users[hub.add_user("ann")]
    request, moment, after = POINTS[point]
    started, pid = threading.Event(), []

    def kill() -> None:
        started.wait()
        os.kill(pid[0], signal.SIGKILL)

    fault = hub.fail(request, cut=moment, after=after, then=kill)
    pid.append(start(runner, quantized_folder))
    started.set()
    assert int(runner.stdout.readline()) == -signal.SIGKILL and fault.times == 0
    visible = hub.repos["ann/tiny"].head if hub.repos else {}
    committed = moment == "after" and "commit" in request or "tree" in request
    assert visible.keys() <= {".gitattributes"} or (committed and {"README.md", WEIGHTS, "model_index.json"} <= visible.keys())
    stored = set(hub.lfs)
    sent_before = hub.count("PUT /lfs/")
    start(runner, quantized_folder)
    assert int(runner.stdout.readline()) == 0
    assert hub.count("PUT /lfs/") - sent_before == 2 - len(stored)
    repo = hub.repos["ann/tiny"]
    assert list(hub.repos) == ["ann/tiny"] and len(repo.commits) == 2
    local = {p.relative_to(quantized_folder).as_posix(): p.read_bytes() for p in quantized_folder.rglob("*") if p.is_file()}
    assert local.items() <= repo.head.items() and "README.md" in repo.head
