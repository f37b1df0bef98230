"""What the Hub's failures mean: the cause and the next step, in words for the person at the screen.

`explained` is the one place that knows status codes. `ask` makes a request and repeats it where that helps: when the
network broke, the Hub had a fault of its own, or it asked to wait a little. Only requests that may safely arrive twice go
through `ask`; whoever creates something looks first whether it is there already.

huggingface_hub repeats some requests by itself: it sleeps as long as the Hub says, for minutes, and hears nobody meanwhile.
Within `watched`, a busy or broken Hub's answer comes back to us at once, so that we can tell the seconds and be stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the HTTP library's own, of whatever went wrong before there was an answer
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from vq4dit.errors import HubError

WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try
LONGEST_WAIT = 60.0  # seconds; when the Hub asks for more, the person decides
TICK_SECONDS = 0.2
PASSING = ("network", "server", "rate")  # reasons that may be gone a moment later
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")  # Xet calls every refusal a network error
TOKEN = re.compile(r"\bhf_(?:oauth_)?[\w.-]{8,}")
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)  # ValueError: a refused file of a batch, a name, a card

Answer = TypeVar("Answer")
Watch = Callable[[float], None]  # hears the seconds that are left to wait, and may raise to stop

_watch: ContextVar[Watch | None] = ContextVar("_watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Call `watch` before every request of this thread (with 0), and five times a second while we wait for the next try."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


def _before_request(request: Any) -> None:
    if watch := _watch.get():
        watch(0.0)


def _after_answer(response: Any) -> None:
    if _watch.get() and (response.status_code == 429 or response.status_code >= 500):
        response.read()
        hf_raise_for_status(response)


def listen() -> None:
    """Make huggingface_hub's session, which all threads share and which is replaced now and then, known to `watched`."""
    hooks = get_session().event_hooks
    if _before_request not in hooks["request"]:
        hooks["request"].append(_before_request)
        hooks["response"].append(_after_answer)


def ask(task: str, request: Callable[[], Answer], repo_id: str = "") -> Answer:
    """The answer to a request, repeated if the network, the Hub's servers or its rate limit were the reason.

    Args:
        task: what was tried, for the message: "upload to ann/model".

    Raises:
        HubError: see `explained`.
    """
    for wait in (*WAITS, None):
        listen()
        try:
            return request()
        except FAILURES as error:
            pause(explained(error, task, repo_id), wait)
    raise AssertionError("the last try returns or raises")


def pause(told: HubError, wait: float | None, also: tuple[str, ...] = ()) -> None:
    """Sleep before the next try, or raise `told` if there is none (`wait` is None) or it would not help.

    Args:
        also: reasons that are worth another try here, besides those that pass by themselves.
    """
    if wait is None or told.reason not in (*PASSING, *also) or told.seconds > LONGEST_WAIT:
        raise told
    end = time.monotonic() + max(told.seconds, wait)
    while (left := end - time.monotonic()) > 0:
        if watch := _watch.get():
            watch(left)
        time.sleep(min(left, TICK_SECONDS))


def explained(error: BaseException, task: str, repo_id: str = "") -> HubError:
    """The failure of a request as a `HubError`: what happened, why, and what to do next."""
    cause = _cause(error)
    told = cause if isinstance(cause, HubError) else _told(cause, task, repo_id)
    told.__cause__ = cause if cause is not told else None
    return told


def _told(error: BaseException, task: str, repo_id: str) -> HubError:
    if isinstance(error, HfHubHTTPError):
        return _kind(error, task, repo_id) or _answered(
            error.response.status_code, error.server_message or "", _seconds(error), task, repo_id
        )
    if isinstance(error, HFValidationError):
        return HubError(f"{task}: {error}", "name")
    if "Consistency check failed" in str(error):
        return HubError(f"{task}: a download ended early, the connection was cut. Try again", "truncated")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{task}: offline mode is on. Unset the environment variable HF_HUB_OFFLINE", "offline")
    if "LFS batch API returned errors" in str(error):
        return _answered(403, str(error), 0.0, task, repo_id)
    if "Invalid metadata in README.md" in str(error):
        return HubError(f"{task}: the Hub does not take the card. {error}", "card")
    if isinstance(error, ConnectionError) and (status := XET_STATUS.search(str(error))):
        return _answered(int(status[1]), "", 0.0, task, repo_id)
    what = f"{type(error).__name__}: {without_tokens(str(error))}"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return HubError(
            f"{task}: the Hub at {constants.ENDPOINT} cannot be reached ({what}). Check the network and try again; what is "
            "uploaded is not sent again",
            "network",
        )
    return HubError(f"{task}: {what}", "unknown")


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what went wrong in an upload thread, or before it looked into its cache."""
    while type(error) in (RuntimeError, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def without_tokens(text: str) -> str:
    """The text with everything that looks like a Hub token blacked out."""
    return TOKEN.sub("hf_***", text)


def _kind(error: HfHubHTTPError, task: str, repo_id: str) -> HubError | None:
    """What huggingface_hub knows of the cause besides the status."""
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        advice = (
            f"Request access at {page}, sign in with the account that has it (in a terminal: `hf auth login`), and try again"
        )
        return HubError(f"{task}: {repo_id} is gated, and this login has no access. {advice}", "gated")
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return HubError(f"{task}: there is no such file or revision in {repo_id}. Check the revision", "missing")
    if isinstance(error, RepositoryNotFoundError):  # whatever the status: the Hub says 401 to those who are not signed in
        return _answered(404, "", 0.0, task, repo_id)
    return None


def _answered(status: int, said: str, seconds: float, task: str, repo_id: str) -> HubError:
    name = repo_id or "of that name"
    said = without_tokens(said).strip().rstrip(".")
    quoted = f' The Hub says: "{said}".' if said else ""
    if status == 404:
        return HubError(
            f"{task}: there is no repository {name}, or it is private and this login may not see it. Check the name; sign in "
            "with an account that has access",
            "missing",
        )
    if status == 401:
        return HubError(
            f"{task}: the login has expired or was revoked. Sign in again (in a terminal: `hf auth login`) and repeat; what "
            "is uploaded is not sent again",
            "login",
        )
    if status == 403:
        return _forbidden(task, name, said, quoted)
    if status == 429:
        when = f"Try again in {seconds:.0f} seconds" if seconds else "Try again in some minutes"
        return HubError(f"{task}: too many requests (429). {when}; what is uploaded is not sent again", "rate", seconds)
    if status >= 500:
        return HubError(
            f"{task}: the Hub has a fault of its own ({status}).{quoted} Try again in some minutes; what is uploaded is not "
            "sent again",
            "server",
        )
    by_status = {
        409: (f"{name} exists already. Choose a new name, a pull request or a new commit", "exists"),
        412: (f"{name} was changed by somebody else meanwhile. Look at it, then push again", "changed"),
        413: (f"a file or the whole commit is larger than the Hub takes.{quoted} Save with smaller shards", "too-large"),
    }
    message, reason = by_status.get(status, (f"the Hub refused ({status}).{quoted}", "card" if status == 400 else "server"))
    return HubError(f"{task}: {message}", reason)


def _forbidden(task: str, name: str, said: str, quoted: str) -> HubError:
    """403 has three usual causes, told apart by the Hub's words."""
    words = said.lower()
    if "storage" in words or "quota" in words:
        return HubError(
            f"{task}: the storage of the account is full.{quoted} Delete something, make the repository public, or upgrade "
            "the plan",
            "storage",
        )
    if "scope" in words or "token" in words or "permission" in words:
        return HubError(
            f"{task}: this login may not do that.{quoted} A login through this app may only touch repositories that the app "
            "created; in a terminal use a token with write access (`hf auth login`)",
            "scope",
        )
    owner = name.split("/")[0]
    return HubError(
        f"{task}: you may not write to {name}.{quoted} Choose your own name, or sign in again and grant the organisation "
        f"{owner}",
        "organization",
    )


def _seconds(error: HfHubHTTPError) -> float:
    headers = error.response.headers
    info = parse_ratelimit_headers(headers)
    if info is not None and info.remaining == 0:
        return float(info.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0
