"""Pictures of a finished project, pair by pair: the same class and noise through the original and the packed model.

`evaluation.compare` gives everything at the end; here each pair is on disk as soon as it is drawn, so that a page can show
the first one while the others are being made, and a comparison that is cut short keeps what it has.

    report/pairs.json                     label, seed, PSNR and SSIM of each pair so far
    report/NAME-seedN-original.png        and -quantized.png, -difference.png
    report/report.json                    all figures, at the end
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vq4dit.disk.files import write_atomically
from vq4dit.evaluation.images import SamplePair, as_image, sample
from vq4dit.evaluation.metrics import Comparison, noise_nmse
from vq4dit.memory import peak_memory
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.progress import OnProgress, Progress
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.worker import COMPUTING, Stopped, stream
from vq4dit.projects.workspace import Project

KINDS = ("original", "quantized", "difference")


@dataclass(frozen=True)
class PairSettings:
    """Which pictures to draw: every class with every seed."""

    labels: tuple[int, ...]
    num_seeds: int = 1
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float = 4.0

    def wanted(self) -> list[tuple[int, int]]:
        """(label, seed), all classes of the first seed before the second seed."""
        return [(label, self.seed + i) for i in range(self.num_seeds) for label in self.labels]


@dataclass(frozen=True)
class Pair:
    """A drawn pair as a page needs it; pictures are files of the report folder."""

    label: int
    name: str
    seed: int
    psnr: float
    ssim: float
    stem: str
    original_seconds: float  # per denoising step
    quantized_seconds: float


def drawn_pairs(project: Project) -> list[Pair]:
    path = project.report / "pairs.json"
    return [Pair(**values) for values in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def report(project: Project) -> dict[str, Any] | None:
    """The figures of a comparison that came to its end."""
    path = project.report / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def draw(project: Project, loader: Loader, settings: PairSettings, seconds: float | None = None) -> Iterator[None]:
    """Draw the pairs that are missing, then measure, for about `seconds` at most; yields twice a second.

    Raises:
        JobError: if somebody else works on the project; others as loading and sampling do.
    """
    end = None if seconds is None else time.monotonic() + seconds
    try:
        yield from stream(lambda on_progress: _draw(project, loader, settings, end, on_progress), project.is_asked_to_stop)
    except Stopped:
        return


def is_complete(project: Project, settings: PairSettings) -> bool:
    """Whether all wanted pairs are drawn and measured together."""
    return report(project) is not None and [(p.label, p.seed) for p in drawn_pairs(project)] == settings.wanted()


def _draw(project: Project, loader: Loader, settings: PairSettings, end: float | None, on_progress: OnProgress) -> None:
    with COMPUTING, project.claim():
        _draw_missing(project, loader, settings, end, on_progress)


def _draw_missing(project: Project, loader: Loader, settings: PairSettings, end: float | None, on_progress: OnProgress) -> None:
    pipelines = loader.original(project), loader.quantized(project)
    names = {index: name for name, index in pipelines[0].labels.items()}
    wanted = settings.wanted()
    pairs = {(pair.label, pair.seed): pair for pair in drawn_pairs(project) if (pair.label, pair.seed) in wanted}
    (project.report / "report.json").unlink(missing_ok=True)  # it was about other pairs
    drew = False
    for label, seed in wanted:
        if (label, seed) in pairs:
            continue
        if drew and end is not None and time.monotonic() > end:  # every turn draws a pair, else it might never end
            return
        drawn = [_timed_sample(pipeline, label, seed, settings, on_progress) for pipeline in pipelines]
        pair = SamplePair(label, seed, drawn[0][0], drawn[1][0])
        seconds_per_step = [seconds / settings.num_inference_steps for _, seconds in drawn]
        pairs[label, seed] = _save(project, pair, names.get(label, str(label)), seconds_per_step)
        _keep(project, pairs, wanted)
        drew = True
        on_progress(Progress("sample", len(pairs), len(wanted)))
    if not drew or end is None or time.monotonic() < end:
        _keep(project, pairs, wanted)  # fewer than before, if the choice is narrower
        _measure(project, loader.original_bytes(project), pipelines, settings, [pairs[key] for key in wanted], on_progress)


def _keep(project: Project, pairs: dict[tuple[int, int], Pair], wanted: list[tuple[int, int]]) -> None:
    content = [asdict(pairs[key]) for key in wanted if key in pairs]
    write_atomically(project.report / "pairs.json", json.dumps(content).encode())


def _timed_sample(
    pipeline: Any, label: int, seed: int, settings: PairSettings, on_progress: OnProgress
) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    steps, guidance = settings.num_inference_steps, settings.guidance_scale
    images = sample(pipeline, [label], [seed], num_inference_steps=steps, guidance_scale=guidance, on_progress=on_progress)
    return images[0], time.perf_counter() - started


def _save(project: Project, pair: SamplePair, name: str, seconds_per_step: list[float]) -> Pair:
    project.report.mkdir(exist_ok=True)
    stem = f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40]}-{pair.label}-seed{pair.seed}"
    for kind in KINDS:
        content = io.BytesIO()
        as_image(getattr(pair, kind)).save(content, "PNG")
        write_atomically(project.report / f"{stem}-{kind}.png", content.getvalue())
    return Pair(pair.label, name, pair.seed, pair.psnr, pair.ssim, stem, seconds_per_step[0], seconds_per_step[1])


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
    error = noise_nmse(
        original,
        quantized,
        num_trajectories=4,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
        on_progress=on_progress,
    )
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
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
    )
    write_atomically(project.report / "report.json", (json.dumps(asdict(figures), indent=1) + "\n").encode())
