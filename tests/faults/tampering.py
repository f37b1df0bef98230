"""A job's files changed behind its back: it ends in the right bytes, or in an error that says so."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from campaign import Case, seeded, snapshot
from commands import QUANTIZE
from worker import Complaint, Worker

TITLE, COUNTED, SHORT = "job tamperings", ("wrong bytes", "tracebacks"), 8
Tampering = Callable[[Path, random.Random, Path], None]  # job, randomness, the folder of all models


def layers(job: Path) -> list[Path]:
    return sorted(job.glob("layers/*.safetensors"))


def pieces(job: Path) -> list[Path]:
    return sorted(job.rglob("*.safetensors"))


def another_layers_piece(job: Path, r: random.Random, models: Path) -> None:
    """Of the same shape, so that nothing but the numbers tells."""
    names = [path for path in layers(job) if "attn1" in path.name]
    first, second = r.sample(names, 2)
    shutil.copy(first, second)


def swapped_pieces(job: Path, r: random.Random, models: Path) -> None:
    first, second = r.sample([path for path in layers(job) if "attn1" in path.name], 2)
    content = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(content)


def a_flipped_bit(job: Path, r: random.Random, models: Path) -> None:
    path = r.choice(pieces(job))
    content = bytearray(path.read_bytes())
    content[r.randrange(len(content) // 2, len(content))] ^= 1 << r.randrange(8)
    path.write_bytes(content)


def a_truncated_piece(job: Path, r: random.Random, models: Path) -> None:
    path = r.choice(pieces(job))
    content = path.read_bytes()
    path.write_bytes(content[: r.randrange(len(content))])


def an_empty_piece(job: Path, r: random.Random, models: Path) -> None:
    r.choice(pieces(job)).write_bytes(b"")


def a_missing_piece(job: Path, r: random.Random, models: Path) -> None:
    r.choice(pieces(job)).unlink()


def missing_pieces(job: Path, r: random.Random, models: Path) -> None:
    for path in r.sample(pieces(job), len(pieces(job)) // 2):
        path.unlink()


def no_layers(job: Path, r: random.Random, models: Path) -> None:
    shutil.rmtree(job / "layers")


def a_folder_for_a_piece(job: Path, r: random.Random, models: Path) -> None:
    path = r.choice(pieces(job))
    path.unlink()
    path.mkdir()


def a_linked_piece(job: Path, r: random.Random, models: Path) -> None:
    first, second = r.sample([path for path in layers(job) if "attn1" in path.name], 2)
    second.unlink()
    second.symlink_to(first)


def a_dangling_piece(job: Path, r: random.Random, models: Path) -> None:
    path = r.choice(pieces(job))
    path.unlink()
    path.symlink_to("nowhere")


def another_seeds_piece(job: Path, r: random.Random, models: Path) -> None:
    """As another job of the same model has it."""
    path = r.choice(layers(job))
    shutil.copy(models / "seed7.job" / "layers" / path.name, path)


def another_recipes_piece(job: Path, r: random.Random, models: Path) -> None:
    other = "kmeans" if (job / "bits.safetensors").exists() else "best"
    path = r.choice(layers(job))
    shutil.copy(models / f"{other}.job" / "layers" / path.name, path)


def described_by_another_seed(job: Path, r: random.Random, models: Path) -> None:
    """All pieces of another seed under this job's description: only its own record can tell."""
    shutil.rmtree(job / "layers")
    shutil.copytree(models / "seed7.job" / "layers", job / "layers")


def other_settings(job: Path, r: random.Random, models: Path) -> None:
    description = json.loads((job / "job.json").read_text())
    description["settings"] |= r.choice(({"seed": 7}, {"bits": 3}, {"keep": ["*.ff.*"]}))
    (job / "job.json").write_text(json.dumps(description))


def another_fingerprint(job: Path, r: random.Random, models: Path) -> None:
    description = json.loads((job / "job.json").read_text())
    description["fingerprint"] = description["fingerprint"][::-1]
    (job / "job.json").write_text(json.dumps(description))


def no_description(job: Path, r: random.Random, models: Path) -> None:
    (job / "job.json").unlink()


def a_damaged_description(job: Path, r: random.Random, models: Path) -> None:
    content = bytearray((job / "job.json").read_bytes())
    content[r.randrange(len(content))] ^= 1 << r.randrange(7)
    (job / "job.json").write_bytes(content)


def a_removed_record(job: Path, r: random.Random, models: Path) -> None:
    """An entry of job.json is gone."""
    description = json.loads((job / "job.json").read_text())
    description.pop(r.choice(sorted(description)))
    (job / "job.json").write_text(json.dumps(description))


TAMPERINGS: tuple[Tampering, ...] = (
    another_layers_piece, swapped_pieces, a_flipped_bit, a_truncated_piece, an_empty_piece, a_missing_piece, missing_pieces,
    no_layers, a_folder_for_a_piece, a_linked_piece, a_dangling_piece, another_seeds_piece, another_recipes_piece,
    described_by_another_seed, other_settings, another_fingerprint, no_description, a_damaged_description, a_removed_record,
)  # fmt: skip


def check(recipe: str, tamper: Tampering, seed: int, name: str, worker: Worker, home: Path) -> Iterator[Complaint]:
    shutil.copytree(worker.folder / f"{recipe}.job", home / "out.job")
    tamper(home / "out.job", seeded(seed, name), worker.folder)
    shutil.copytree(worker.folder / "model", home / "model")
    command = [*QUANTIZE[recipe].split(), "--output", "out", "--resume"]
    outcome = worker.run(home, "cli", *command, seconds=60)
    yield from outcome.complaints()
    if outcome.code == 0 and snapshot(home / "out") != snapshot(worker.folder / recipe):
        yield Complaint("wrong bytes", "it ended well, in other bytes than the undisturbed job")
    if outcome.code != 0 and (home / "out").exists():
        yield Complaint("wrong bytes", "it failed, and left a result")


def cases(seed: int) -> list[Case]:
    found = []
    for recipe in QUANTIZE:
        for tampering in TAMPERINGS:
            name = f"tampering/{recipe}/{tampering.__name__}"
            found.append(Case(name, partial(check, recipe, tampering, seed, name)))
    return found
