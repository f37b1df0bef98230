"""What commands take in common: kinds of arguments, each with a sentence about what it must be, and the device."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

import torch

from vq4dit.cli.streams import standard_error
from vq4dit.devices import DEVICE, describe, resolve

MOST = 10**9  # steps, trajectories: beyond it nothing ends
SEEDS = range(-(2**63), 2**63)
LARGEST_GUIDANCE = 1000.0


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


def guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST_GUIDANCE:
        raise argparse.ArgumentTypeError(
            f"must be a number from {-LARGEST_GUIDANCE:g} to {LARGEST_GUIDANCE:g}, got {text!r:.60}"
        )
    return value


def class_names(text: str) -> list[str]:
    """Names or numbers of classes; what they are called in a model is known later."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names or numbers of classes, separated by commas, got {text!r:.60}")
    return names


def model_name(text: str) -> str:
    """A Hub id, or the path of a folder, in which a shell may have left the home directory for us."""
    return os.path.expanduser(text) if text.startswith("~") else text


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


def add_sampling(sub: argparse.ArgumentParser) -> None:
    add_device(sub)
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--steps", type=positive, default=25, help="denoising steps (default: 25)")
    sub.add_argument("--guidance", type=guidance, default=4.0, help="guidance scale (default: 4)")
    sub.add_argument(
        "--decode",
        default="auto",
        choices=["auto", "load", "forward"],
        help="decode a packed model once at load, or in every forward pass (small memory); default: load if memory allows",
    )
