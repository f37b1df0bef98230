"""The app under the real `spaces` package and a scheduler on loopback: leases end, are refused, expire, and are killed.

Each time nothing finished is lost, and the result has the bytes of a job that was never interrupted.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest
from app_server import AppServer, made_by_the_command, weights
from browsing import Visitor, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from zero_gpu_scheduler import EXPIRED, NO_GPU, QUOTA, Scheduler

pytestmark = [needs_chromium, pytest.mark.slow]


@pytest.fixture(scope="module")
def scheduler():
    with Scheduler() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory, root, scheduler):
    folder = tmp_path_factory.mktemp("space") / "jobs"
    environment = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": scheduler.url, "VQ4DIT_SLICE_SECONDS": "3"}
    with AppServer(folder, "--root", str(root), program="tests/support/zero_gpu_app.py", **environment) as found:
        yield found


def permission() -> str:
    """What the platform's proxy adds to a signed-in visitor's requests."""
    payload = base64.urlsafe_b64encode(json.dumps({"user": "ann"}).encode()).decode().rstrip("=")
    return f"e30.{payload}.x"


@pytest.fixture
def visitor(server, browser):
    found = Visitor(browser, server.url, extra_http_headers={"x-ip-token": permission()})
    return found.arrive("?model=folder:tiny&recipe=paper&seed=7")


def goes_on_to_the_same_bytes(visitor: Visitor, root: Path, folder: Path) -> None:
    visitor.see("#progress .done")
    assert weights(visitor.download(folder)) == made_by_the_command(str(root / "tiny"), "--recipe", "paper", "--seed", "7")


def test_the_card_says_whose_day_is_long_enough(visitor):
    visitor.see("#card .quota", "anonymous: fits")
    visitor.see("#card thead", "time on the GPU, about")


def test_a_job_of_several_leases_streams_and_outlives_a_kill_a_refusal_and_an_expired_permission(
    visitor, scheduler, root, tmp_path
):
    """One job through all of it: lease, killed worker, spent quota, no GPU, expired permission, leases to the end."""
    scheduler.kill_after = 2.0
    visitor.press("#start")
    visitor.see("#progress .trouble", "The GPU was taken away in the middle of its work. Finished layers are kept.")
    visitor.see("#progress .trouble", "What to do: Press Resume")

    scheduler.refuse.append(QUOTA)
    visitor.press("#resume")
    visitor.see("#progress .trouble", "Your share of GPU time for today is used up. Finished layers are kept.")
    visitor.see(
        "#progress .trouble", "Resume in 3 h 25 min, or sign in to Hugging Face for a larger share, or copy the command"
    )
    visitor.shoot("zero-gpu-quota", "#run")

    scheduler.refuse.append(NO_GPU)
    visitor.press("#resume")
    visitor.see("#progress .trouble", "No GPU was free just now.")

    leases = len(scheduler.leases)
    scheduler.refuse.append(EXPIRED)
    visitor.press("#resume")  # the expired one is followed by an event of its own, with a new permission
    goes_on_to_the_same_bytes(visitor, root, tmp_path)
    assert not scheduler.refuse
    assert len(scheduler.leases) >= leases + 3
    assert all(lease["durationSeconds"] == "60" and lease["token"] == permission() for lease in scheduler.leases)


def test_a_job_goes_on_when_its_visitor_returns(server, browser, root, tmp_path):
    visitor = Visitor(browser, server.url, extra_http_headers={"x-ip-token": permission()})
    visitor.arrive("?model=folder:tiny&recipe=paper&seed=8")
    visitor.press("#start")
    visitor.see("#progress", "Calibrating")
    visitor.page.close()
    time.sleep(2)  # longer than a step: the lease is over
    visitor.reopen().arrive()
    visitor.see("#progress .done", "tiny-2bit · paper · seed 8 is packed")
    assert weights(visitor.download(tmp_path)) == made_by_the_command(str(root / "tiny"), "--recipe", "paper", "--seed", "8")


def test_a_permission_that_stays_expired_pauses_the_job(visitor, scheduler):
    visitor.press("#start")
    visitor.see("#progress", "Calibrating")
    visitor.press("#stop")
    visitor.see("#progress .trouble", "You stopped it")
    visitor.events.wait_until_over()  # between two time slices a stop is told at once, and the next one still asks for a GPU
    scheduler.refuse += [EXPIRED, EXPIRED]
    visitor.press("#resume")
    visitor.see("#progress .trouble", "Your permission to use the GPU ran out between two time slices.")
    visitor.see("#progress .trouble", "What to do: Reload this page and press Resume.")
    time.sleep(1)
    assert not scheduler.refuse  # two requests, not a third
