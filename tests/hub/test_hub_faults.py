"""Everything the Hub, the network and a login can do wrong: the cause, the next step, and never a half-finished result."""

import dataclasses
import pickle
import re
import threading
import time
import traceback
from pathlib import Path

import pytest
from hub_fixtures import publish
from hub_server import Hub

from vq4dit.errors import HubError
from vq4dit.hub.account import sign_in
from vq4dit.hub.push import same_image
from vq4dit.pipelines.hub_errors import explained
from vq4dit.pipelines.load import check_access, load_pipeline

ALWAYS = 99


def failure(action) -> HubError:
    with pytest.raises(HubError) as caught:
        action()
    return caught.value


def visible(hub: Hub) -> set[str]:
    """What a visitor finds in all repositories."""
    return {f"{repo_id}/{path}" for repo_id, repo in hub.repos.items() for path in repo.head} - {"ann/tiny/.gitattributes"}


CREATE, BATCH, PUT, COMMIT = "POST /api/repos/create", "POST .*/objects/batch", "PUT /lfs/", "POST .*/commit/"
WORDS = {
    "401": (dict(request=COMMIT, status=401, message="Invalid credentials in Authorization header"), "login", "Sign in again"),
    "403-scope": (
        dict(request=CREATE, status=403, message="Your token does not have the required scope"),
        "scope",
        "use a token with write access",
    ),
    "403-organisation": (
        dict(request=CREATE, status=403, message="You don't have the rights to create a model under the namespace"),
        "organization",
        "grant the organisation ann",
    ),
    "403-storage": (
        dict(request=BATCH, status=403, message="Private repository storage limit reached"),
        "storage",
        "Delete something",
    ),
    "404": (dict(request="POST .*/preupload/", status=404, code="RepoNotFound"), "missing", "Check the name"),
    "409": (dict(request=CREATE, status=409, message="You already created this model repo"), "exists", "Choose a new name"),
    "412": (dict(request=COMMIT, status=412, message="A commit has happened since"), "changed", "then push again"),
    "413": (dict(request=COMMIT, status=413, message="Payload too large"), "too-large", "smaller shards"),
    "429": (
        dict(
            request=COMMIT, status=429, headers={"ratelimit": '"api";r=0;t=217', "ratelimit-policy": '"fixed";"api";q=5;w=300'}
        ),
        "rate",
        "Try again in 217 seconds",
    ),
    "429-retry-after": (dict(request=PUT, status=429, headers={"Retry-After": "75"}), "rate", "Try again in 75 seconds"),
    "500": (dict(request=PUT, status=500), "server", "a fault of its own (500)"),
    "503": (dict(request=COMMIT, status=503), "server", "Try again in some minutes"),
    "cut": (dict(request=PUT, cut="before"), "network", "Check the network and try again"),
    "cut-commit": (dict(request=COMMIT, cut="before"), "network", "what is uploaded is not sent again"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_lasting_fault_is_told_and_leaves_nothing_half_finished(hub, ann, quantized_folder, name):
    fault, reason, words = WORDS[name]
    hub.fail(**fault, times=ALWAYS)
    error = failure(lambda: publish(quantized_folder, ann))
    assert (error.reason, visible(hub)) == (reason, set())
    assert words in str(error) and "ann/tiny" in str(error)
    hub.faults.clear()
    assert not publish(quantized_folder, ann).was_there
    assert len(hub.repos) == 1 and len(hub.repos["ann/tiny"].commits) == 2


@pytest.mark.parametrize(
    "fault",
    [
        dict(request=PUT, status=500, after=1),
        dict(request=PUT, cut="before"),
        dict(request=CREATE, status=500),
        dict(request=CREATE, cut="after"),
        dict(request=COMMIT, status=503),
        dict(request=COMMIT, cut="before"),
        dict(request=COMMIT, cut="after"),
        dict(request=COMMIT, status=429, headers={"Retry-After": "0"}),
        dict(request="GET /api/models/ann/tiny", status=502),
        dict(request="GET .*/tree/", status=504),
        dict(request="POST .*/preupload/", cut="before"),
    ],
    ids=lambda fault: " ".join(str(value) for value in fault.values()),
)
def test_a_passing_fault_is_repeated_without_a_second_repository_or_commit(hub, ann, quantized_folder, fault):
    hub.fail(**fault)
    publish(quantized_folder, ann)
    assert hub.faults[0].times == 0, "the fault happened"
    assert list(hub.repos) == ["ann/tiny"] and len(hub.repos["ann/tiny"].commits) == 2


def test_a_lost_answer_does_not_open_a_second_pull_request(hub, ann, quantized_folder):
    hub.add_repo("acme/tiny", {"config.json": b"{}"})
    hub.fail(COMMIT, cut="after")
    pushed = publish(quantized_folder, ann, "acme/tiny", existing="pull-request")
    assert len(hub.repos["acme/tiny"].pull_requests) == 1 and pushed.url.endswith("/acme/tiny/discussions/1")
    again = publish(quantized_folder, ann, "acme/tiny", existing="pull-request")
    assert again.was_there and len(hub.repos["acme/tiny"].pull_requests) == 1


def test_a_private_push_does_not_rest_on_a_public_copy(hub, ann, quantized_folder):
    publish(quantized_folder, ann)
    error = failure(lambda: publish(quantized_folder, ann, private=True))
    assert error.reason == "exists" and "is public" in str(error)


def test_what_is_uploaded_is_not_sent_again(hub, ann, quantized_folder):
    hub.fail(COMMIT, status=401, message="Invalid credentials in Authorization header")
    failure(lambda: publish(quantized_folder, ann))
    sent = hub.count(PUT)
    publish(quantized_folder, sign_in(hub.add_user("ann")))
    assert sent == hub.count(PUT) == 2


# --- logins ---


def test_a_revoked_login_is_told_when_signing_in(hub):
    token = "hf_" + "x" * 34
    error = failure(lambda: sign_in(token))
    assert error.reason == "login" and token not in "".join(traceback.format_exception(error))


def test_nobody_is_signed_in(hub, monkeypatch):
    assert "hf auth login" in str(failure(sign_in))


def test_a_space_never_lends_its_owners_login(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("owner"))
    assert sign_in().name == "owner"
    monkeypatch.setenv("SPACE_ID", "owner/space")
    assert "sign in with your Hugging Face account" in str(failure(sign_in)) and hub.count("whoami") == 1


def test_an_error_of_the_hub_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(HubError("too many", "rate", 7.0)))
    assert (str(error), error.reason, error.seconds) == ("too many", "rate", 7.0)


def test_an_expiring_login_is_noticed_before_anything_is_sent(hub, quantized_folder):
    account = sign_in(hub.add_user("ann"))
    late = dataclasses.replace(account, expires_at=time.time() + 5)
    hub.requests.clear()
    error = failure(lambda: publish(quantized_folder, late))
    assert error.reason == "login" and "sign in again before you upload" in str(error) and hub.requests == []


def test_an_organisation_that_was_not_granted_is_refused_before_anything_is_sent(ann):
    error = failure(lambda: ann.repo_id("rich-corp/model"))
    assert error.reason == "organization" and "choose one of ann, acme" in str(error)


def test_organisations_that_may_only_be_read_are_no_targets(hub):
    assert sign_in(hub.add_user("ann", orgs={"acme": "write", "museum": "read"})).targets == ("ann", "acme")


def test_a_login_through_the_app_may_not_touch_other_repositories(hub, quantized_folder):
    visitor = sign_in(hub.add_user("ann", scopes=["openid", "contribute-repos"]))
    hub.add_repo("ann/older", {"config.json": b"{}"})
    error = failure(lambda: publish(quantized_folder, visitor, "ann/older", existing="commit"))
    assert error.reason == "scope" and "repositories that the app created" in str(error)
    publish(quantized_folder, visitor)  # one of its own


@pytest.mark.parametrize("request_that_fails", ["GET /api/whoami", COMMIT, PUT, BATCH])
def test_no_error_shows_the_token(hub, ann, quantized_folder, request_that_fails):
    hub.fail(request_that_fails, status=418, message=f"what is {ann.token}?", times=ALWAYS)
    error = failure(lambda: publish(quantized_folder, sign_in(ann.token)))
    assert ann.token not in f"{error} {error!r} {error.__dict__} {ann!r}"


# --- stopping ---


def test_an_upload_can_be_cancelled_in_the_middle_of_a_file(hub, ann, quantized_folder):
    hub.fail(PUT, slow=0.1, times=ALWAYS)
    cancel, seen = threading.Event(), []

    def listen(progress):
        seen.append(progress)
        if progress.done > 60_000:
            cancel.set()

    error = failure(lambda: publish(quantized_folder, ann, on_progress=listen, cancel=cancel))
    assert error.reason == "cancelled" and "goes on where this one stopped" in str(error)
    assert visible(hub) == set() and not hub.lfs and {p.stage for p in seen} == {"upload"}
    assert 60_000 < seen[-1].done < seen[-1].total
    hub.faults.clear()
    publish(quantized_folder, ann)


def test_a_wait_that_the_hub_asks_for_is_told_in_seconds_and_can_be_cancelled(hub, ann, quantized_folder):
    hub.fail(COMMIT, status=429, headers={"Retry-After": "40"})
    seen, started = [], time.monotonic()

    def stop(progress):
        if seconds := progress.metrics.get("wait_seconds"):
            seen.append(seconds)
            cancel.set()

    cancel = threading.Event()
    error = failure(lambda: publish(quantized_folder, ann, on_progress=stop, cancel=cancel))
    assert error.reason == "cancelled" and 39 < seen[0] <= 40 and time.monotonic() - started < 20
    assert visible(hub) == set() and hub.count(COMMIT) == 1
    publish(quantized_folder, ann)


@pytest.mark.parametrize("request_that_waits", [PUT, COMMIT, "GET .*/tree/", "POST .*/preupload/"])
def test_a_wait_of_minutes_is_left_to_the_person(hub, ann, quantized_folder, request_that_waits):
    """huggingface_hub would sleep that long, five times, and tell nobody."""
    hub.fail(request_that_waits, status=429, headers={"Retry-After": "217"}, times=ALWAYS)
    error = failure(lambda: publish(quantized_folder, ann))
    assert (error.reason, error.seconds) == ("rate", 217.0) and hub.count(request_that_waits) == 1


def test_only_a_push_takes_the_waiting_from_huggingface_hub(hub, ann, quantized_folder, tmp_path):
    pushed = publish(quantized_folder, ann)
    before = hub.count("GET .*/resolve/")
    hub.fail("GET .*/resolve/.*safetensors", status=429, headers={"Retry-After": "217"})
    assert same_image(quantized_folder, pushed, ann) and hub.faults[-1].times == 0 and hub.count("GET .*/resolve/") > before


def test_a_listener_can_cancel_too(hub, ann, quantized_folder):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(quantized_folder, ann, on_progress=stop)
    assert visible(hub) == set()


def test_progress_goes_up_to_the_last_byte(hub, ann, quantized_folder):
    seen: list = []
    pushed = publish(quantized_folder, ann, on_progress=lambda progress: seen.append(progress.done))
    assert seen == sorted(seen) and seen[-1] == pushed.num_bytes and len(set(seen)) > 5


# --- reading ---


def test_a_gated_base_is_told_from_a_missing_one(hub, ann):
    hub.add_repo("corp/gated", {"model_index.json": b"{}"}, gated=True)
    for action in (lambda: check_access("corp/gated", ann.token), lambda: load_pipeline("corp/gated", token=ann.token)):
        error = failure(action)
        assert error.reason == "gated" and f"Request access at {hub.url}/corp/gated" in str(error)
    for action in (lambda: check_access("corp/none", ann.token), lambda: load_pipeline("corp/none", token=ann.token)):
        error = failure(action)
        assert error.reason == "missing" and "there is no repository corp/none" in str(error)


def test_a_gated_base_is_read_with_a_login_that_was_granted(hub, ann, model_folder):
    files = {p.relative_to(model_folder).as_posix(): p.read_bytes() for p in Path(model_folder).rglob("*") if p.is_file()}
    hub.add_repo("corp/gated", files, gated=True, readers={"ann"})
    assert load_pipeline("corp/gated", token=ann.token, revision=hub.repos["corp/gated"].refs["main"]).transformer is not None


def test_a_truncated_download_goes_on(hub, ann, quantized_folder):
    pushed = publish(quantized_folder, ann)
    hub.fail("GET .*/resolve/.*safetensors", cut="half")
    assert same_image(quantized_folder, pushed, ann)


def test_a_download_that_always_ends_early_is_told(hub, ann, quantized_folder):
    pushed = publish(quantized_folder, ann)
    hub.fail("GET .*/resolve/.*safetensors", cut="half", times=999)
    error = failure(lambda: same_image(quantized_folder, pushed, ann))
    assert error.reason in ("network", "truncated") and re.search("try again", str(error), re.IGNORECASE)


# --- words that no request of these tests brings up ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("LFS batch API returned errors: storage limit reached"), "storage"),
        (ValueError("Invalid metadata in README.md. - license must be one of"), "card"),
        (OSError("Consistency check failed: file should be of size 2 but has size 1"), "truncated"),
        (OSError("No space left on device"), "unknown"),
        (TimeoutError("timed out"), "network"),
    ],
    ids=str,
)
def test_other_failures_are_explained_too(error, reason):
    told = explained(error, "push to ann/tiny", "ann/tiny")
    assert told.reason == reason and str(told).startswith("push to ann/tiny: ") and told.__cause__ is error
