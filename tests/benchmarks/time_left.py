"""How right the time left is that the page tells, at every moment of a job.

    OMP_NUM_THREADS=1 python tests/benchmarks/time_left.py [--model assets/emoji-dit] [--recipe best] [--processor]

Works on a job as the app does, with `--turn SECONDS` in turns, and asks twice a second, as the page does, what is left; in the
end that is compared with what was left. Time begins where the page gives the job to its worker. `--processor` counts the
seconds that processors work for this process in place of those that pass: with one thread, what a machine takes that does
nothing else.
"""

import argparse
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME))

import torch  # noqa: E402

from vq4dit.bundled import BUNDLED, suggested_call  # noqa: E402
from vq4dit.config import QuantizationSettings  # noqa: E402
from vq4dit.projects.catalog import Catalog  # noqa: E402
from vq4dit.projects.pipeline_cache import Loader  # noqa: E402
from vq4dit.projects.project import Forecast, Project  # noqa: E402
from vq4dit.projects.worker import work  # noqa: E402
from vq4dit.projects.workspace import Workspace  # noqa: E402
from vq4dit.recipes.estimate import estimate, seconds_left  # noqa: E402

NEAR_SECONDS = 5.0  # the end: by so much the page may be wrong without anybody minding


class Moment(NamedTuple):
    """What the page tells, `now` seconds after the beginning."""

    now: float
    stage: str  # "" before the first counter
    told: float | None  # seconds left

    def ratio(self, end: float) -> float:
        return (self.told or 0.0) / (end - self.now)

    def is_right(self, end: float, near: float = 0.0) -> bool:
        left = end - self.now
        return self.told is not None and abs(self.told - left) <= max(left / 3, near)


def new_project(folder: Path, model: str, recipe: str) -> Project:
    """As the page begins one."""
    settings = QuantizationSettings(recipe=recipe, call=suggested_call(model))
    card = Catalog(HOME).card(model, recipe=recipe, call=settings.call_arguments)
    workspace = Workspace(folder / "jobs")
    project = workspace.open(workspace.visitor(None), model, settings, card.commit)
    project.set_forecast(Forecast(card.inspection.num_blocks, estimate(card.inspection, settings, "cpu").stages))
    return project


def watch(project: Project, turn: float) -> tuple[list[Moment], float, int]:
    """Moments of a whole job, its end and how many turns it took."""
    clock, loader, stages = time.monotonic, Loader(Catalog(HOME)), project.forecast().stages
    moments, turns, begun = [], 0, clock()
    while project.status().phase in ("new", "waiting"):
        turns, turn_begun = turns + 1, clock()
        for _ in work(project, loader, None if turn == math.inf else turn):
            now, events = clock() - begun, project.events()
            told = seconds_left(events, stages, now, turn, begun + now - turn_begun)
            moments.append(Moment(now, events[-1].stage if events else "", told))
    end = clock() - begun
    assert project.status().phase == "done", project.status()
    return [moment for moment in moments if moment.now < end], end, turns


def row(name: str, moments: list[Moment], end: float, estimated: float) -> str:
    ratios = [moment.ratio(end) for moment in moments]
    near = [moment.ratio(end) for moment in moments if end - moment.now > 2 * NEAR_SECONDS] or [float("nan")]
    third, almost = (sum(moment.is_right(end, within) for moment in moments) / len(moments) for within in (0.0, NEAR_SECONDS))
    return (
        f"| {name} | {estimated:.0f} | {moments[0].now:.0f}-{moments[-1].now:.0f} | {min(ratios):.2f}-{max(ratios):.2f} "
        f"| {min(near):.2f}-{max(near):.2f} | {third:.0%} | {almost:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--recipe", default="best", choices=["best", "paper", "kmeans"])
    parser.add_argument("--turn", type=float, default=math.inf)
    parser.add_argument("--processor", action="store_true")
    args = parser.parse_args()
    if args.processor:
        time.monotonic = time.process_time  # by which turns end and events are dated, too
    with tempfile.TemporaryDirectory() as folder:
        project = new_project(Path(folder), args.model, args.recipe)
        moments, end, turns = watch(project, args.turn)
        stages = project.forecast().stages
    counted = next(moment.now for moment in moments if moment.stage)
    told = next(moment.now for moment in moments if moment.told is not None)
    print(f"{args.model}, {args.recipe}, 2 bits: {end:.0f} s in {turns} turns, estimated {sum(stages.values()):.0f} s")
    clock = "processor" if args.processor else "wall"
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {clock} clock")
    print(f"first counter after {counted:.1f} s, first time left after {told:.1f} s\n")
    print("| stage | estimated, s | asked at, s | told / real | until 10 s before the end | within a third | or 5 s |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in stages.items():
        if of_stage := [moment for moment in moments if moment.stage == name]:
            print(row(name, of_stage, end, seconds))
    print(row("all", moments, end, sum(stages.values())))


if __name__ == "__main__":
    main()
