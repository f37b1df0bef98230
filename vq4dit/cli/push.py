"""`python -m vq4dit push`: a quantized model and its card into an account of the Hugging Face Hub."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from functools import partial
from pathlib import Path

from rich.markup import escape

from vq4dit.cli.bars import progress_bars
from vq4dit.cli.options import folder_path
from vq4dit.cli.terminal import Console, Report, errors
from vq4dit.disk.files import told, write_atomically
from vq4dit.errors import HubError, JobError
from vq4dit.evaluation.compare import is_of_comparison
from vq4dit.hub.account import look_up_base, sign_in
from vq4dit.hub.base import default_name, default_visibility
from vq4dit.hub.model_card import model_card, read_report
from vq4dit.hub.push import Existing, Pushed, Target, push, same_image
from vq4dit.models.conditions import condition_kind
from vq4dit.pipelines.load import check_pipeline, load_pipeline
from vq4dit.pipelines.provenance import read_origin


def add_push_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=folder_path, metavar="DIR", help="what `quantize` wrote")
    sub.add_argument(
        "repo", nargs="?", metavar="REPO", help="name, or owner/name for an organisation (default: from base and bits)"
    )
    visibility = sub.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="only you, or the organisation, can see it")
    visibility.add_argument("--public", dest="private", action="store_false", help="default if the base's licence is free")
    existing = sub.add_mutually_exclusive_group()
    existing.add_argument("--pr", action="store_true", help="if REPO exists: open a pull request")
    existing.add_argument("--commit", action="store_true", help="if REPO exists: add a commit")
    sub.add_argument("--base", metavar="ID", help="Hub id of the base, if DIR does not say")
    sub.add_argument("--report", type=folder_path, metavar="DIR", help="what `compare BASE DIR` wrote, for the card")
    sub.add_argument(
        "--kmeans-report", type=folder_path, metavar="DIR", help="what `compare` wrote of recipe kmeans at the same bits"
    )
    sub.add_argument("--card", type=folder_path, metavar="FILE", help="write the card to FILE and stop: look at it first")
    sub.add_argument("--verify", action="store_true", help="afterwards download it, load it and compare one image bit by bit")


def push_command(args: argparse.Namespace) -> Report:
    config = check_pipeline(str(args.folder))
    origin = read_origin(args.folder)
    if args.base:
        origin = dataclasses.replace(origin, model=args.base, revision=origin.revision if origin.model == args.base else "")
    account = sign_in()
    base = look_up_base(origin, account.token)
    bits = (config.get("quantization_config") or {}).get("bits", 0)
    repo_id = account.repo_id(args.repo or default_name(base.model or args.folder.name, bits))
    report = read_report(args.report) if args.report else None
    kmeans = read_report(args.kmeans_report) if args.kmeans_report else None
    extras = evidence(args.report, args.kmeans_report)
    card = model_card(args.folder, repo_id, base, report, kmeans)
    if args.card:
        write_card(args.card, card)
        errors().print(f"the card of {escape(repo_id)} is in {escape(str(args.card))}; nothing was sent")
        return lambda: None
    private, reason = default_visibility(base) if args.private is None else (args.private, "as you said")
    errors().print(f"{escape(repo_id)}: {'private' if private else 'public'}, {escape(reason)}", highlight=False)
    existing: Existing = "pull-request" if args.pr else "commit" if args.commit else "refuse"
    if args.verify:  # which draws an image: asked before anything is published
        condition_kind(load_pipeline(str(args.folder)))
    target = Target(repo_id=repo_id, private=private, existing=existing)
    with progress_bars() as on_progress:
        pushed = push(args.folder, target, account, card=card, extras=extras, on_progress=on_progress)
    same = same_image(args.folder, pushed, account) if args.verify else None
    if same is False:
        raise HubError(f"{repo_id} was pushed, but loaded from there it gives another image: tell the authors", "checksum")
    return partial(report_pushed, args, pushed, same)


def report_pushed(args: argparse.Namespace, pushed: Pushed, same: bool | None) -> None:
    if args.json:
        print(json.dumps({**dataclasses.asdict(pushed), "same_image": same}, indent=1))
        return
    state = "was there already, nothing was sent" if pushed.was_there else f"{pushed.num_bytes / 1e6:.2f} MB"
    checked = f"checksums of {pushed.num_files} files verified" + (", one image is the same bit by bit" if same else "")
    Console().print(f"{escape(pushed.url)}: {state}; {checked}", highlight=False, soft_wrap=True)


def write_card(path: Path, card: str) -> None:
    """Write a card and its checksum, in a comment at the end.

    Raises:
        JobError: if there is a file already that is no card of ours, or one that somebody has changed.
    """
    with told(path):
        if os.path.lexists(path) and not (path.is_file() and _is_our_card(path.read_bytes())):
            raise JobError(f"{path} is there already and says something else: move it away, or name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _sealed(card.encode()))


def _sealed(card: bytes) -> bytes:
    return card + f"\n<!-- written by vq4dit, sha256 {hashlib.sha256(card).hexdigest()} -->\n".encode()


def _is_our_card(content: bytes) -> bool:
    """Whether `write_card` wrote this, and nobody has changed it since."""
    return content == _sealed(content.rpartition(b"\n<!-- written by vq4dit")[0])


def evidence(report: Path | None, kmeans_report: Path | None) -> dict[str, Path]:
    """The files behind the card's figures, by their name in the repository.

    Raises:
        HubError: if one is missing, or is not as `compare` wrote it: it may be anything.
    """
    files: dict[str, Path] = {}
    if report:
        files |= {"report.json": report / "report.json", "samples.png": report / "pairs.png"}
    if kmeans_report:
        files["report-kmeans.json"] = kmeans_report / "report.json"
    if strange := [str(path) for path in files.values() if not is_of_comparison(path)]:
        raise HubError(
            f"{', '.join(strange)} is missing, or not as `compare` wrote it (a link, or changed since), and is not published: "
            "make the comparison again with `python -m vq4dit compare`",
            "card",
        )
    return files
