"""Whatever stands where a command writes: nothing of the user's is lost, replaced or changed.

A case is a tree of files, made before, and a command. All that is in the tree belongs to the user, but for what is planted
as `Ours`: results and jobs that the command may replace or delete when it is told to. What is refused is refused before
any work: it leaves nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import commands
from campaign import Case, lost, snapshot
from worker import Complaint, Worker

TITLE, COUNTED, SHORT = "output-path cases", ("user files lost", "tracebacks", "leftovers"), 20
QUANTIZE, COMPARE = f"{commands.QUANTIZE['kmeans']} --output", f"{commands.COMPARE} --output"
SAMPLE = "sample model --labels cat --steps 1 --output"


@dataclass(frozen=True)
class Of:
    """A copy of one of the models (`tiny_models.py`), the user's."""

    name: str


class Ours(Of):
    """A copy that may be replaced."""


@dataclass(frozen=True)
class Link:
    """A symbolic link, the user's."""

    target: str


Tree = Mapping[str, str | Of | Link | None]  # a file's text, a copy, a link, an empty folder


@dataclass(frozen=True)
class PathCase:
    """A command, run where `tree` and an original `model` are."""

    command: str
    tree: Tree
    codes: tuple[int, ...] = (1,)
    names: str = ""  # what the refusal must name
    makes: str = ""  # where the result must be if it succeeds
    as_nobody: bool = False  # by somebody who may read only

    def check(self, worker: Worker, home: Path) -> Iterator[Complaint]:
        ours = plant(worker.folder, home, {"model": Of("model"), **self.tree})
        before = snapshot(home)
        command, *arguments = shlex.split(self.command)
        call = [command, *arguments] if command == "save" else ["cli", command, *arguments]
        outcome = worker.run(home, *call, seconds=60, as_nobody=self.as_nobody)
        after = snapshot(home)
        yield from outcome.complaints(self.codes)
        yield from lost(before, after, ours)
        if outcome.code != 0 and self.names not in outcome.output:
            yield Complaint("wrong words", f"{self.names!r} is not in {outcome.output[-500:]!r}")
        if 0 not in self.codes and (new := after.keys() - before.keys()):
            yield Complaint("leftovers", f"refused, and left {sorted(new)[0]!r}")
        if outcome.code == 0 and self.makes:
            wanted = {f"transformer/{name}": it for name, it in snapshot(worker.folder / "kmeans/transformer").items()}
            if not wanted.items() <= snapshot(home / self.makes).items():
                yield Complaint("wrong results", f"{self.makes!r} is not the quantized model")


def plant(models: Path, home: Path, tree: Tree) -> set[str]:
    """Make the files; returns the names of those that are ours. Files planted in a copy of ours are the user's."""
    ours: set[str] = set()
    for name, entry in tree.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match entry:
            case None:
                path.mkdir()
            case Link():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                path.symlink_to(entry.target)
                continue  # in place of something of ours it may go too: what it leads to counts
            case Of():
                copy = shutil.copytree if (models / entry.name).is_dir() else shutil.copy
                copy(models / entry.name, path)
                if isinstance(entry, Ours):
                    ours |= {name, *(f"{name}/{inner}" for inner in snapshot(path))}
                    continue
            case str():
                path.write_text(entry)
        ours.discard(name)
    return ours


MINE = "mine"
JOB: Tree = {"out.job": Ours("kmeans.job")}
RESULT: Tree = {"out": Ours("kmeans")}
COMPARISON: Tree = {"kmeans": Of("kmeans"), "out": Ours("comparison")}
LAYER = "layers/transformer_blocks.0.attn1.to_q.safetensors"
EITHER, DONE, REFUSED, MISUSED = (0, 1), (0,), (1,), (1, 2)


def of_another(model: str, output: str) -> str:
    return QUANTIZE.replace("quantize model", f"quantize {model}") + f" {output}"


def into_jobs() -> dict[str, PathCase]:
    """`quantize --output out` where something stands at out.job."""
    resume = f"{QUANTIZE} out --resume"
    cases = {
        "a file of mine": PathCase(f"{QUANTIZE} out", {"out.job/notes.txt": MINE}, names="out.job"),
        "weights of mine": PathCase(f"{QUANTIZE} out", {"out.job/layers/mine.safetensors": MINE}, names="out.job"),
        "a file of mine, resumed": PathCase(resume, {"out.job/notes.txt": MINE}, names="out.job"),
        "a job.json of mine": PathCase(resume, {"out.job/job.json": "{}", "out.job/a": MINE}),
        "an empty folder": PathCase(f"{QUANTIZE} out", {"out.job": None}, EITHER),
        "a file": PathCase(f"{QUANTIZE} out", {"out.job": MINE}),
        "the model": PathCase(of_another("m.job", "m"), {"m.job": Of("other")}),
        "the model inside": PathCase(of_another("m.job/model", "m"), {"m.job/model": Of("other")}),
        "another model": PathCase(f"{QUANTIZE} out", {"out.job": Of("other")}),
        "a link to scratch": PathCase(f"{QUANTIZE} out", {"scratch/a/b.safetensors": MINE, "out.job": Link("scratch")}),
        "a link to an empty folder": PathCase(f"{QUANTIZE} out", {"scratch": None, "out.job": Link("scratch")}, EITHER),
        "a dangling link": PathCase(f"{QUANTIZE} out", {"out.job": Link("nowhere")}, EITHER),
        "a link loop": PathCase(f"{QUANTIZE} out", {"out.job": Link("out.job")}),
        "a job of another model": PathCase(of_another("other", "out --resume"), {"other": Of("other"), **JOB}),
        "a job of another recipe": PathCase(resume, {"out.job": Of("best.job")}),
        "a job, not resumed": PathCase(f"{QUANTIZE} out", {"out.job": Of("kmeans.job")}, names="--resume"),
        "a job and a file of mine": PathCase(resume, {**JOB, "out.job/notes.txt": MINE}, EITHER, makes="out"),
        "a job and weights of mine": PathCase(resume, {**JOB, "out.job/layers/lora.safetensors": MINE}, EITHER, makes="out"),
        "a job and a link to mine": PathCase(
            resume, {**JOB, "far/a.safetensors": MINE, "out.job/layers/far": Link("../../far")}, EITHER, makes="out"
        ),
        "a link to a job with a file of mine": PathCase(
            resume, {"far": Ours("kmeans.job"), "far/notes.txt": MINE, "out.job": Link("far")}, EITHER, makes="out"
        ),
        "layers is a link": PathCase(resume, {**JOB, "far/a.safetensors": MINE, "out.job/layers": Link("../far")}, EITHER),
    }
    for name, path in {"a layer": LAYER, "the lock": "lock", "job.json": "job.json"}.items():
        back = "../" * (path.count("/") + 1)
        tree = {**JOB, "mine.bin": MINE, f"out.job/{path}": Link(f"{back}mine.bin")}
        cases[f"{name} is a link to a file of mine"] = PathCase(resume, tree, EITHER)
    return cases


def over_something() -> dict[str, PathCase]:
    """`quantize --output out` where something stands at out itself."""
    original: Tree = {"out": Of("other"), "out/pytorch_lora_weights.safetensors": MINE, "out/.git/config": MINE}
    overwrite, cases = f"{QUANTIZE} out --overwrite", {}
    for name, option in {"": "", ", overwritten": " --overwrite"}.items():
        command = f"{QUANTIZE} out{option}"
        cases |= {
            f"another original{name}": PathCase(command, original, names="out"),
            f"a clean original{name}": PathCase(command, {"out": Of("other")}, names="out"),
            f"a folder of mine{name}": PathCase(command, {"out/a/b.txt": MINE}, names="out"),
            f"a file{name}": PathCase(command, {"out": MINE}, names="out"),
            f"an empty folder{name}": PathCase(command, {"out": None}, DONE, makes="out"),
            f"a link to a file{name}": PathCase(command, {"mine.txt": MINE, "out": Link("mine.txt")}),
            f"a link to an empty folder{name}": PathCase(command, {"disk": None, "out": Link("disk")}, DONE, makes="disk"),
            f"a link to a folder of mine{name}": PathCase(command, {"disk/a.txt": MINE, "out": Link("disk")}),
            f"a dangling link{name}": PathCase(command, {"out": Link("nowhere")}, EITHER, makes="nowhere"),
            f"a link loop{name}": PathCase(command, {"a": Link("out"), "out": Link("a")}, MISUSED),
            f"a link to the model{name}": PathCase(command, {"out": Link("model")}),
            f"hidden folders of mine{name}": PathCase(
                command, {".out.partial/a": MINE, ".out.previous/b": MINE, ".out.previous/c/d": MINE}, DONE, makes="out"
            ),
        }
    for extra in (
        "notes.txt",
        "transformer/pytorch_lora_weights.safetensors",
        ".git/config",
        "README.md",
        "scheduler/x/y.json",
    ):
        cases[f"a result and {extra.replace('/', ' ')}"] = PathCase(
            overwrite, {**RESULT, f"out/{extra}": MINE}, names=extra.split("/")[-1]
        )
    moved: Tree = {**RESULT, "far": Of("model"), "out/vae": Link("../far/vae")}
    finished: Tree = {"other": Of("other"), "out": Of("kmeans")}
    foreign = of_another("other", "out --resume")
    return cases | {
        "a result": PathCase(f"{QUANTIZE} out", {"out": Of("kmeans")}, names="--overwrite"),
        "a result, overwritten": PathCase(overwrite, RESULT, DONE, makes="out"),
        "a result, resumed": PathCase(f"{QUANTIZE} out --resume", {"out": Of("kmeans")}, EITHER, makes="out"),
        "a result and hidden folders": PathCase(overwrite, {**RESULT, ".out.partial/a": MINE, ".out.previous/b": MINE}, DONE),
        "a result whose vae is a link": PathCase(overwrite, moved, EITHER, makes="out"),
        "a link to a result": PathCase(overwrite, {"disk": Ours("kmeans"), "out": Link("disk")}, DONE, makes="disk"),
        "another's result": PathCase(foreign, finished),
        "another's result and an empty job": PathCase(foreign, {**finished, "out.job": None}),
        "another's result and a foreign job": PathCase(foreign, {**finished, "out.job/notes.txt": MINE}),
        "another's result and its job": PathCase(foreign, {**finished, **JOB}),
        "a folder of mine named like a result": PathCase(overwrite, {"out/model_index.json": "{}", "out/a": MINE}),
        "a folder with a result in it": PathCase(overwrite, {"out/run1": Of("kmeans")}),
    }


def odd_outputs() -> dict[str, PathCase]:
    """Outputs that are no place, or have a strange name."""
    where = {
        "empty": "",
        "the model": "model",
        "around the model": ".",
        "above": "..",
        "the root": "/",
        "below a file": "file.txt/out",
        "in proc": "/proc/vq4dit",
        "below null": "/dev/null/out",
        "with a null": "a\0b",
        "256 bytes": "b" * 256,
        "255 bytes": "c" * 255,
        "252 bytes": "d" * 252,
        "600 bytes of unicode": "模" * 200,
        "a long path": "/".join(["e" * 200] * 25),
    }
    tree: Tree = {"file.txt": MINE}
    cases = {
        f"{name}{more}": PathCase(f"{QUANTIZE} {shlex.quote(out)}{more}", tree, MISUSED)
        for name, out in where.items()
        for more in ("", " --overwrite")
    }
    cases["240 bytes"] = PathCase(f"{QUANTIZE} {'f' * 240}", tree, EITHER)
    cases["inside the model"] = PathCase(f"{QUANTIZE} model/out", {}, EITHER)
    cases["read-only"] = PathCase(f"{QUANTIZE} out", {}, as_nobody=True)
    cases["read-only result"] = PathCase(f"{QUANTIZE} out --overwrite", {"out": Of("kmeans")}, as_nobody=True)
    cases["read-only, compared"] = PathCase(f"{COMPARE} out", {"kmeans": Of("kmeans")}, as_nobody=True)
    names = ["ünï 模型", "a\nb", "[red]x[/]", "%s{0}", " ", "a\tb", "'\"`$(x)", "a.", "\x1b[31mred", "\u202egnp", "~"]
    for name in [*names, os.fsdecode(b"\xff\xfe")]:
        out = f"--output={shlex.quote(name)}"
        cases[f"named {ascii(name)}"] = PathCase(f"{commands.QUANTIZE['kmeans']} {out}", {}, (0, 1, 2))
    return cases


def drawings() -> dict[str, PathCase]:
    """`compare` and `sample`, which write pictures."""
    kmeans: Tree = {"kmeans": Of("kmeans")}
    overwrite = f"{COMPARE} out --overwrite"
    return {
        "a comparison": PathCase(f"{COMPARE} out", {**kmeans, "out": Of("comparison")}),
        "a comparison, overwritten": PathCase(overwrite, COMPARISON, DONE),
        "a report.json of mine": PathCase(overwrite, {**kmeans, "out/report.json": '{"mine": 1}'}),
        "a report.json and pictures of mine": PathCase(
            overwrite, {**kmeans, "out/report.json": '{"mine": 1}', "out/holiday.png": Of("sample.png")}
        ),
        "a comparison and a picture of mine": PathCase(overwrite, {**COMPARISON, "out/holiday.png": MINE}, names="holiday.png"),
        "a comparison and a sample of mine": PathCase(
            overwrite, {**COMPARISON, "out/best-of-all.png": Of("sample.png")}, names="best-of-all.png"
        ),
        "a comparison and a folder of mine": PathCase(overwrite, {**COMPARISON, "out/a/b.txt": MINE}, names="a"),
        "a folder of mine": PathCase(overwrite, {**kmeans, "out/a.txt": MINE}),
        "a file": PathCase(overwrite, {**kmeans, "out": MINE}),
        "the model": PathCase(f"{COMPARE} model --overwrite", kmeans),
        "the quantized model": PathCase(f"{COMPARE} kmeans --overwrite", kmeans),
        "a link to a comparison": PathCase(overwrite, {**kmeans, "far": Ours("comparison"), "out": Link("far")}, EITHER),
        "a link to a file": PathCase(overwrite, {**kmeans, "mine.txt": MINE, "out": Link("mine.txt")}),
        "an empty output": PathCase(f"{COMPARE} ''", kmeans, MISUSED),
        "an empty folder": PathCase(f"{COMPARE} out", {**kmeans, "out": None}, DONE),
        "hidden folders": PathCase(overwrite, {**COMPARISON, ".out.partial/a": MINE, ".out.previous/b": MINE}, DONE),
        "sample onto a picture of mine": PathCase(f"{SAMPLE} a.png", {"a.png": Of("model/model_index.json")}),
        "sample onto a link": PathCase(f"{SAMPLE} a.png", {"far.png": MINE, "a.png": Link("far.png")}),
        "sample onto a folder": PathCase(f"{SAMPLE} a.png", {"a.png/b": MINE}, MISUSED),
        "sample below a file": PathCase(f"{SAMPLE} a/b.png", {"a": MINE}, MISUSED),
        "sample to an empty name": PathCase(f"{SAMPLE} ''", {}, MISUSED),
        "sample to a long name": PathCase(f"{SAMPLE} {'a' * 252}.png", {}, MISUSED),
        "sample read-only": PathCase(f"{SAMPLE} a.png", {}, MISUSED, as_nobody=True),
    }


def in_library() -> dict[str, PathCase]:
    """`vq4dit.save`."""
    return {
        "a link to a folder": PathCase("save model out", {"disk": None, "out": Link("disk")}, DONE, makes="disk"),
        "a folder of mine": PathCase("save model out overwrite", {"out/a": MINE}),
        "another original": PathCase("save model out overwrite", {"out": Of("other"), "out/.git/config": MINE}),
        "a result and notes": PathCase("save model out overwrite", {**RESULT, "out/notes.txt": MINE}, names="notes.txt"),
        "hidden folders": PathCase("save model out", {".out.partial/a": MINE, ".out.previous/b": MINE}, DONE),
    }


def cases(seed: int) -> list[Case]:
    groups = {"job": into_jobs(), "over": over_something(), "odd": odd_outputs(), "draw": drawings(), "save": in_library()}
    return [Case(f"output_paths/{group}/{name}", case.check) for group, named in groups.items() for name, case in named.items()]
