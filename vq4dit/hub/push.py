"""Publish a quantized model: everything in one commit, so that a repository is complete or visibly empty.

    1  look     is the repository there, and is it this very content already? Then nothing is sent.
    2  create   an empty repository, if there is none.
    3  upload   the large files, one by one. The Hub stores them by their hash and shows them to nobody yet; what a push that
                was cut has stored is not sent again.
    4  commit   weights, configuration, report and card become visible together.
    5  verify   every file's checksum against the Hub's.

A push that died anywhere is repeated as it was: step 1 finds out how far it came. So no step ever makes a second
repository, pull request or commit, and nothing that exists is replaced unless `existing` says how.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np
from huggingface_hub import CommitOperationDelete, HfApi, ModelInfo, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from vq4dit.errors import HubError
from vq4dit.evaluation.images import sample, some_conditions
from vq4dit.hub.account import Account
from vq4dit.hub.staging import staged
from vq4dit.hub.upload import WatchedFile, store
from vq4dit.pipelines.hub_errors import FAILURES, ask, explained, listen, pause, watched
from vq4dit.pipelines.inventory import part_classes
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.provenance import recorded_call
from vq4dit.progress import OnProgress, Progress, ignore

Existing = Literal["refuse", "pull-request", "commit"]
BELONGS_TO_THE_HUB = {".gitattributes"}
WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before a change is tried again, as huggingface_hub itself would wait


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish. `existing` says what happens if the repository has content already."""

    repo_id: str
    private: bool
    existing: Existing = "refuse"


@dataclass(frozen=True)
class Pushed:
    """A push that is complete and verified."""

    repo_id: str
    revision: str  # commit
    url: str  # of the repository, or of the pull request
    private: bool
    num_files: int
    num_bytes: int
    was_there: bool  # the same content was published before; nothing was sent


def push(
    folder: Path,
    target: Target,
    account: Account,
    *,
    card: str,
    extras: Mapping[str, Path] | None = None,
    on_progress: OnProgress = ignore,
    cancel: Event | None = None,
) -> Pushed:
    """Publish the quantized pipeline in `folder`. Repeat the same call to go on after any failure.

    Args:
        card: README.md, see `model_card`.
        extras: more files by their name in the repository: report.json, samples.png.
        on_progress: hears of "upload", in bytes, and of "wait_seconds" when the Hub asks to wait; an exception it raises
            cancels.
        cancel: set it in another thread to stop; nothing is visible on the Hub before the commit.

    Raises:
        HubError: for everything the Hub, the network or the login can do wrong, with reason "exists" if the repository has
            other content and `target.existing` is "refuse", and if a file is not to be published (see `staged`).
    """
    account.check()
    with staged(folder, card, extras or {}) as stage, disable_progress_bars():
        attempt = _Attempt(target, account, stage, cancel or Event(), on_progress)
        with watched(attempt.wait):
            state = attempt.state()
            attempt.check_visibility(state)
            found = attempt.find(state)
            if found is None:
                attempt.check_choice(state)
                parent = state.sha or "" if state else attempt.create()
                attempt.upload()
                found = attempt.commit(parent)
            revision, url, was_there = found
            attempt.verify(revision)
        sizes = [path.stat().st_size for path in attempt.files.values()]
        private = bool(state.private) if state else target.private
        return Pushed(target.repo_id, revision, url, private, len(sizes), sum(sizes), was_there)


class _Attempt:
    """One push: what is to be published, and the steps of the module's docstring."""

    def __init__(self, target: Target, account: Account, stage: Path, cancel: Event, on_progress: OnProgress):
        self.target, self.account, self.stage, self.cancel, self.on_progress = target, account, stage, cancel, on_progress
        self.api = HfApi(token=account.token)
        self.files = {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}
        self.total = sum(path.stat().st_size for path in self.files.values())
        self.sent, self.told, self.is_committing = 0, 0, False
        self.task = f"push to {target.repo_id}"
        self.operations = [WatchedFile(name, str(path)) for name, path in self.files.items()]
        for operation in self.operations:
            operation.on_bytes = lambda count: self.tell(self.sent + count)

    @property
    def as_pull_request(self) -> bool:
        return self.target.existing == "pull-request"

    def tell(self, sent: int, **metrics: float) -> None:
        if self.cancel.is_set():
            visible = f"It is whole or not at all at {self.url}" if self.is_committing else "Nothing of it is visible"
            raise HubError(
                f"{self.task}: cancelled. {visible}; the same push again goes on where this one stopped", "cancelled"
            )
        self.told = max(self.told, min(sent, self.total))  # a file sent again begins anew
        self.on_progress(Progress("upload", self.told, self.total, metrics))

    def wait(self, seconds: float) -> None:
        """Before a request, and while there is something to wait for."""
        self.tell(self.told, **({"wait_seconds": seconds} if seconds else {}))

    # --- look ---

    def state(self) -> ModelInfo | None:
        """The repository as it is, None if there is none."""
        try:
            return ask(self.task, lambda: self.api.model_info(self.target.repo_id), self.target.repo_id)
        except HubError as error:
            if error.reason == "missing":
                return None
            raise

    def find(self, state: ModelInfo | None) -> tuple[str, str, bool] | None:
        """The revision that holds exactly this push already, its page, and True."""
        if state is None or not _names(state):
            return None
        if self.matches(state.sha or "main"):
            return state.sha or "main", self.url, True
        if self.as_pull_request:
            listed = ask(self.task, lambda: list(self._own_pull_requests()), self.target.repo_id)
            for request in listed:
                if self.matches(request.git_reference or ""):
                    info = ask(self.task, lambda: self.api.model_info(self.target.repo_id, revision=request.git_reference))  # noqa: B023
                    return info.sha or "", request.url, True
        return None

    def _own_pull_requests(self) -> Iterator:
        return self.api.get_repo_discussions(
            self.target.repo_id, author=self.account.name, discussion_type="pull_request", discussion_status="open"
        )

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.target.repo_id}"

    def matches(self, revision: str) -> bool:
        """Whether a revision holds every file of this push, by its checksum, and no leftover of another model."""
        found = ask(
            self.task,
            lambda: self.api.verify_repo_checksums(self.target.repo_id, revision=revision, local_dir=self.stage),
            self.target.repo_id,
        )
        return not (found.mismatches or found.extra_paths or self.leftovers(found.missing_paths))

    def leftovers(self, names: list[str]) -> list[str]:
        """Of the names, those in the model's own folders that this push does not have: shards of an earlier one."""
        folders = part_classes(self.stage)  # those too that are referenced now, and were copied before
        return [name for name in names if name.split("/")[0] in folders and name not in self.files]

    def check_choice(self, state: ModelInfo | None) -> None:
        """Raise `HubError` if the repository has other content and nobody said what to do with it."""
        repo_id = self.target.repo_id
        if state is None:
            if self.as_pull_request:
                raise HubError(f"there is no repository {repo_id} to open a pull request on: push without it", "missing")
            return
        if _names(state) and self.target.existing == "refuse":
            raise HubError(
                f"{repo_id} exists already and has other content. Choose a new name, a pull request (--pr) or a new commit "
                "(--commit); nothing was changed",
                "exists",
            )

    def check_visibility(self, state: ModelInfo | None) -> None:
        """Raise `HubError` if what shall be private would land in a public repository."""
        if state is not None and self.target.private and not state.private:
            raise HubError(
                f"{self.target.repo_id} exists already and is public, this push shall be private: make the repository private "
                "in its settings, choose a new name, or push publicly (--public)",
                "exists",
            )

    # --- change ---

    def create(self) -> str:
        """Make the empty repository; returns its first commit. Looks again before every new try."""
        for wait in (*WAITS, None):
            listen()
            try:
                self.api.create_repo(self.target.repo_id, private=self.target.private, exist_ok=False)
            except FAILURES as error:
                pause(explained(error, self.task, self.target.repo_id), wait, also=("exists",))
            state = self.state()
            if state is not None:
                self.check_visibility(state)
                self.check_choice(state)
                return state.sha or ""
        raise HubError(f"{self.target.repo_id} was created, but the Hub does not show it: try again in a minute", "server")

    def upload(self) -> None:
        """Store the large files, one by one; the small ones travel with the commit."""
        large = [[operation] for operation in self.operations if operation.path_in_repo.endswith(".safetensors")]
        small = [operation for operation in self.operations if [operation] not in large]
        for part in (*large, small):
            self.tell(self.sent)
            self.account.check()
            done = self.sent + sum(operation.upload_info.size for operation in part)
            self.store(part)
            self.sent = done
        self.tell(self.sent)

    def store(self, part: list[WatchedFile]) -> None:
        """Again and again if that may help: what arrived is not sent again."""
        for wait in (*WAITS, None):
            listen()
            try:
                return store(self.api, self.target.repo_id, part, as_pull_request=self.as_pull_request)
            except FAILURES as error:
                pause(explained(error, self.task, self.target.repo_id), wait)

    def commit(self, parent: str) -> tuple[str, str, bool]:
        """Make everything visible; after a lost answer, look whether it arrived before sending it again."""
        names = ask(self.task, lambda: self.api.list_repo_files(self.target.repo_id), self.target.repo_id)
        deletions = [CommitOperationDelete(name) for name in self.leftovers(names)]
        for wait in (*WAITS, None):
            self.tell(self.sent)
            self.is_committing = True
            listen()
            try:
                done = self.api.create_commit(
                    self.target.repo_id,
                    [*self.operations, *deletions],
                    commit_message="Publish with vq4dit",
                    create_pr=self.as_pull_request,
                    parent_commit=parent or None,
                )
                return done.oid, done.pr_url or self.url, False
            except FAILURES as error:
                told = explained(error, self.task, self.target.repo_id)
                pause(told, wait, also=("changed",))
                if found := self.find(self.state()):
                    return (*found[:2], False)
                if told.reason == "changed":
                    raise told from error
        raise AssertionError("the last try returns or raises")

    # --- verify ---

    def verify(self, revision: str) -> None:
        """Raise `HubError` unless the Hub's checksums are those of the local files."""
        if not self.matches(revision):
            raise HubError(
                f"{self.task}: the Hub has other checksums than the local files; push again with a new commit", "checksum"
            )


def _names(state: ModelInfo) -> set[str]:
    """Files of a repository, apart from what the Hub itself puts there."""
    return {sibling.rfilename for sibling in state.siblings or []} - BELONGS_TO_THE_HUB


def same_image(folder: Path, pushed: Pushed, account: Account) -> bool:
    """Download what was pushed, load it, and compare one image with that of the local folder, bit by bit.

    Raises:
        HubError: if the download fails.
    """
    with tempfile.TemporaryDirectory() as copy, disable_progress_bars():
        task, token, call = f"download {pushed.repo_id} again", account.token, recorded_call(str(folder))
        ask(task, lambda: snapshot_download(pushed.repo_id, revision=pushed.revision, token=token, local_dir=copy))
        pipelines = (load_pipeline(str(place), token=token) for place in (folder, copy))  # one after the other
        local, remote = (sample(p, some_conditions(p, 1), [0], num_inference_steps=4, call=call) for p in pipelines)
    return np.array_equal(local, remote)
