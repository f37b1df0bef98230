"""What commands take in common: kinds of arguments, each with a sentence about what it must be, and the device."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

import torch

from vq4dit.bundled import suggested_call
from vq4dit.cli.streams import standard_error
from vq4dit.config import CallValue, call_items
from vq4dit.devices import DEVICE, describe, resolve
from vq4dit.models.conditions import read_argument
from vq4dit.pipelines.repository import hub_id

MOST = 10**9  # steps, trajectories: beyond it nothing ends
SEEDS = range(-(2**63), 2**63)
LARGEST_GUIDANCE = 1000.0
GUIDANCE = "guidance_scale"  # what --guidance is short for
MOST_LINES, MOST_BYTES = 10_000, 1_000_000  # of a file of prompts


def positive(text: str) -> int:
    return _whole(text, range(1, MOST + 1))


def seed(text: str) -> int:
    """A number that every generator of noise takes, and those after it that a grid of images needs."""
    return _whole(text, SEEDS)


def _whole(text: str, allowed: range) -> int:
    number = int(text) if re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) else None
    if number is None or number not in allowed:
        raise argparse.ArgumentTypeError(f"must be a whole number from {allowed[0]} to {allowed[-1]}, got {text!r:.60}")
    return number


def guidance(text: str) -> tuple[str, CallValue]:
    """A guidance scale, as the argument of a pipeline's call that it is."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST_GUIDANCE:
        raise argparse.ArgumentTypeError(
            f"must be a number from {-LARGEST_GUIDANCE:g} to {LARGEST_GUIDANCE:g}, got {text!r:.60}"
        )
    return GUIDANCE, value


def call_argument(text: str) -> tuple[str, CallValue]:
    """NAME=VALUE: an argument of a pipeline's call. What is no JSON is text."""
    if text.startswith(f"{GUIDANCE}="):
        return guidance(text.removeprefix(f"{GUIDANCE}="))
    try:
        (argument,) = call_items(dict([read_argument(text)]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return argument


def prompt(text: str) -> str:
    try:
        text.encode()  # what is no text cannot be read by a model
    except UnicodeEncodeError:
        text = ""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be a text that says what to draw, got none")
    return text


def prompts_file(text: str) -> list[str]:
    """The prompts in a file: one a line, without blank lines and those that begin with #."""
    try:
        with open(model_name(text), "rb") as file:
            content = file.read(MOST_BYTES + 1)
        lines = content[:MOST_BYTES].decode("utf-8-sig", "ignore" if len(content) > MOST_BYTES else "strict").splitlines()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is no text in UTF-8: save it as such") from error
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.100} cannot be read ({getattr(error, 'strerror', error)})") from error
    if len(content) > MOST_BYTES or len(lines) > MOST_LINES:
        raise argparse.ArgumentTypeError(
            f"a file of prompts has at most {MOST_LINES} lines and {MOST_BYTES / 1e6:g} MB, and {text!r:.100} has more: "
            "take a part of it"
        )
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise argparse.ArgumentTypeError(f"{text!r:.100} holds no prompt: write one a line")
    return prompts


def class_names(text: str) -> list[str]:
    """Names or numbers of classes; what they are called in a model is known later."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names or numbers of classes, separated by commas, got {text!r:.60}")
    return names


def model_name(text: str) -> str:
    """A Hub id or the address of its page, or the path of a folder, whose home directory a shell may have left for us."""
    return os.path.expanduser(text) if text.startswith("~") else hub_id(text)


def folder_path(text: str) -> Path:
    try:
        text.encode()  # what is no text could not be shown either
        path = Path(text).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder or file ({error})") from error
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be the name of a folder or file, got {text!r}")
    return path


def picture_path(text: str) -> Path:
    path = folder_path(text)
    if path.suffix.lower() != ".png" or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    return path


def device_name(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:N or mps, got {text!r:.60}")
    return text


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps (default: auto, a GPU if there is one)",
    )


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`, told in the first line on standard error.

    Raises:
        VQ4DiTError: if it is not there.
    """
    device = resolve(args.device)
    standard_error().write(f"device: {describe(device)}\n")
    return device


def add_keep(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help='layers to leave in 16 bit, such as "*.ff.*"; repeatable'
    )


def add_call(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--call",
        action="append",
        default=[],
        type=call_argument,
        metavar="NAME=VALUE",
        help="a further argument of the pipeline's own call, such as true_cfg_scale=3 or height=512; repeatable (default: the "
        "pipeline's own; of a bundled model what it is made for)",
    )


def call_for(args: argparse.Namespace) -> dict[str, CallValue]:
    """What the pipeline's call is told: --call, or, without any, what is suggested for a bundled model."""
    return dict(args.call) or suggested_call(args.model)


def add_conditions(sub: argparse.ArgumentParser, required: bool) -> None:
    """What is to be drawn; which of both a pipeline wants is known later."""
    default = "" if required else " (default: eight of all)"
    group = sub.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--labels", type=class_names, metavar="A,B", help=f"classes by name or number, separated by commas{default}"
    )
    group.add_argument("--prompt", dest="prompts", action="append", type=prompt, metavar="TEXT", help="repeatable")
    group.add_argument("--prompts", type=prompts_file, metavar="FILE", help="one prompt a line; those with # are left out")


def add_sampling(sub: argparse.ArgumentParser) -> None:
    add_device(sub)
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--steps", type=positive, default=25, help="denoising steps (default: 25)")
    add_call(sub)
    sub.add_argument(
        "--guidance",
        dest="call",
        action="append",
        type=guidance,
        metavar="SCALE",
        help="short for --call guidance_scale=SCALE (default: what the model was calibrated with, or the pipeline's own)",
    )
    sub.add_argument(
        "--decode",
        default="auto",
        choices=["auto", "load", "forward"],
        help="decode a packed model once at load, or in every forward pass (small memory); default: load if memory allows",
    )
