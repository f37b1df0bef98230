"""Pictures of a finished project, pair by pair: the same condition and noise through the original and the packed model.

`evaluation.compare` gives everything at the end; here each pair is on disk as soon as it is drawn, so that a page can show
the first one while the others are being made, and a comparison that is cut short keeps what it has.

    report/pairs.json                     condition, seed, PSNR and SSIM of each pair so far
    report/NAME-seedN-original.png        and -quantized.png, -difference.png; of a film, some frames side by side
    report/report.json                    all figures, at the end
    measuring.json                        how far that came, while figures are measured
    not_drawn.json                        why pairs could not be drawn
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import TimeBudget
from vq4dit.errors import VQ4DiTError
from vq4dit.evaluation.images import SamplePair, as_image, sample
from vq4dit.evaluation.metrics import Comparison, noise_nmse
from vq4dit.memory import peak_memory
from vq4dit.models.conditions import Condition, guided_call
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.progress import OnProgress, Progress
from vq4dit.projects.pair_settings import Key, PairSettings
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.project import Project, Status
from vq4dit.projects.worker import TICK_SECONDS, Stopped, failure, heed, stream

KINDS = ("original", "quantized", "difference")
GO_ON = "What is drawn is kept: press Draw pairs again. If it happens again, report it with the details below."
NAME_LENGTH = 40  # of a file's name: the words of a class or a prompt


@dataclass(frozen=True)
class Pair:
    """A drawn pair as a page needs it; pictures are files of the report folder."""

    condition: Condition
    name: str
    seed: int
    psnr: float
    ssim: float
    stem: str
    original_seconds: float  # per denoising step
    quantized_seconds: float
    guidance_scale: float | None = None

    @property
    def key(self) -> Key:
        return Key(self.condition, self.seed, self.guidance_scale)


def drawn_pairs(project: Project) -> list[Pair]:
    path = project.report / "pairs.json"
    return [_pair_of(values) for values in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _pair_of(values: dict[str, Any]) -> Pair:
    """A pair of the list; earlier versions drew classes only."""
    return Pair(**{"condition" if name == "label" else name: value for name, value in values.items()})


def report(project: Project) -> dict[str, Any] | None:
    """The figures of a comparison that came to its end."""
    path = project.report / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def why_not_drawn(project: Project) -> Status | None:
    """What the last drawing failed with, if it did."""
    path = project.folder / "not_drawn.json"
    return Status(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def measuring(project: Project) -> tuple[int, int] | None:
    """How many steps of how many, while all figures of the pairs are measured."""
    path = project.folder / "measuring.json"
    try:
        done, total = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return done, total


def _tell_measuring(project: Project, on_progress: OnProgress) -> OnProgress:
    """A listener that also keeps what `measuring` tells, twice a second at most."""
    told = 0.0

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= TICK_SECONDS:
            told = time.monotonic()
            write_atomically(project.folder / "measuring.json", json.dumps([progress.done, progress.total]).encode())
        on_progress(progress)

    return tell


def draw(project: Project, loader: Loader, settings: PairSettings, seconds: float | None = None) -> Iterator[None]:
    """Draw the pairs that are missing, then measure, for about `seconds` at most; yields twice a second.

    Raises:
        JobError: if somebody else works on the project; others as loading and sampling do.
    """
    task = Drawing(project, loader, settings)
    yield from stream(lambda check_stop: task.work(TimeBudget(seconds), check_stop), heed(project))


@dataclass(frozen=True)
class Drawing:
    """Pairs to draw as a task of the queue."""

    project: Project
    loader: Loader
    settings: PairSettings

    def lined_up(self) -> AbstractContextManager[None]:
        return self.project.lined_up()

    def work(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        """Draw what is missing; whether another time slice is wanted. Why it failed is kept in the project's folder."""
        project = self.project
        try:
            with project.claim():
                for old in ("not_drawn.json", "measuring.json"):  # of a drawing that failed, of a server that was killed
                    (project.folder / old).unlink(missing_ok=True)
                if is_complete(project, self.settings):
                    return False
                check_stop(Progress("sample", 0, 1))
                return _draw_missing(project, self.loader, self.settings, budget, check_stop)
        except Stopped:
            pass
        except Exception as error:
            if not (project.folder / "project.json").exists():
                raise  # it was removed
            status = failure(error)
            if not isinstance(error, VQ4DiTError | ValueError):  # then its advice is how to go on with a quantization
                status = replace(status, next_step=GO_ON)
            write_atomically(project.folder / "not_drawn.json", json.dumps(asdict(status)).encode())
        return False

    def seconds_left(self) -> float | None:
        """By the pace of the pairs that are drawn."""
        drawn = [pair for pair in drawn_pairs(self.project) if pair.key in self.settings.wanted()]
        per_step = [pair.original_seconds + pair.quantized_seconds for pair in drawn]
        missing = len(self.settings.wanted()) - len(drawn)
        return float(np.mean(per_step)) * self.settings.num_inference_steps * missing if drawn else None


def is_complete(project: Project, settings: PairSettings) -> bool:
    """Whether all wanted pairs are drawn and measured together."""
    return report(project) is not None and [pair.key for pair in drawn_pairs(project)] == settings.wanted()


def _draw_missing(
    project: Project, loader: Loader, settings: PairSettings, budget: TimeBudget, on_progress: OnProgress
) -> bool:
    pipelines = loader.original(project), loader.quantized(project)
    names: dict[Condition, str] = {index: name for name, index in (getattr(pipelines[0], "labels", None) or {}).items()}
    wanted = settings.wanted()
    pairs = {pair.key: pair for pair in drawn_pairs(project) if pair.key in wanted}
    (project.report / "report.json").unlink(missing_ok=True)  # it was about other pairs
    drew = False
    for key in wanted:
        if key in pairs:
            continue
        if drew and not budget.allows(0.0):  # every time slice draws a pair, else it might never end
            return True
        drawn = [_timed_sample(pipeline, key, project, settings, on_progress) for pipeline in pipelines]
        pair = SamplePair(key.condition, key.seed, drawn[0][0], drawn[1][0])
        seconds_per_step = [seconds / settings.num_inference_steps for _, seconds in drawn]
        pairs[key] = _save(project, pair, names.get(key.condition, str(key.condition)), seconds_per_step, key.guidance_scale)
        _keep(project, pairs, wanted)
        drew = True
        on_progress(Progress("sample", len(pairs), len(wanted)))
    if drew and not budget.allows(0.0):
        return True
    _keep(project, pairs, wanted)  # fewer than before, if the choice is narrower
    measured = _tell_measuring(project, on_progress)
    try:
        _measure(project, loader.original_bytes(project), pipelines, settings, [pairs[key] for key in wanted], measured)
    finally:
        (project.folder / "measuring.json").unlink(missing_ok=True)
    return False


def _keep(project: Project, pairs: dict[Key, Pair], wanted: list[Key]) -> None:
    content = [asdict(pairs[key]) for key in wanted if key in pairs]
    write_atomically(project.report / "pairs.json", json.dumps(content).encode())


def _timed_sample(
    pipeline: Any, key: Key, project: Project, settings: PairSettings, on_progress: OnProgress
) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    images = sample(
        pipeline,
        [key.condition],
        [key.seed],
        num_inference_steps=settings.num_inference_steps,
        call=settings.call(project),
        on_progress=on_progress,
    )
    return images[0], time.perf_counter() - started


def _save(project: Project, pair: SamplePair, name: str, seconds_per_step: list[float], guidance_scale: float | None) -> Pair:
    project.report.mkdir(exist_ok=True)
    stem = file_stem(name, pair.condition, pair.seed)
    for kind in KINDS:
        content = io.BytesIO()
        as_image(getattr(pair, kind)).save(content, "PNG")
        write_atomically(project.report / f"{stem}-{kind}.png", content.getvalue())
    original_seconds, quantized_seconds = seconds_per_step
    return Pair(
        pair.condition, name, pair.seed, pair.psnr, pair.ssim, stem, original_seconds, quantized_seconds, guidance_scale
    )


def file_stem(name: str, condition: Condition, seed: int) -> str:
    """What a pair's files begin with: some words for people, and another one for every class and prompt."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", name)[:NAME_LENGTH]
    own = hashlib.sha256(condition.encode()).hexdigest()[:16] if isinstance(condition, str) else condition
    return f"{words}-{own}-seed{seed}"


def _measure(
    project: Project,
    original_bytes: int,
    pipelines: tuple[Any, Any],
    settings: PairSettings,
    pairs: list[Pair],
    on_progress: OnProgress,
) -> None:
    """Noise error on trajectories that nobody saw, sizes and speeds; then the report is whole."""
    original, quantized = pipelines
    call = settings.call(project)
    error = noise_nmse(original, quantized, num_trajectories=4, call=call, seed=settings.seed, on_progress=on_progress)
    told = guided_call(original, call)
    figures = Comparison(
        noise_nmse=error,
        psnr_db=float(np.mean([pair.psnr for pair in pairs])),
        ssim=float(np.mean([pair.ssim for pair in pairs])),
        original_bytes=original_bytes,
        quantized_bytes=tensor_bytes(str(project.result)),
        original_seconds_per_step=float(np.median([pair.original_seconds for pair in pairs])),
        quantized_seconds_per_step=float(np.median([pair.quantized_seconds for pair in pairs])),
        peak_memory_bytes=peak_memory(original.transformer.device),
        num_pairs=len(pairs),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=float(told.pop("guidance_scale", 0.0) or 0.0),
        seed=settings.seed,
        call=told,
    )
    write_atomically(project.report / "report.json", (json.dumps(asdict(figures), indent=1) + "\n").encode())
