"""Run a job of the tiny model and die (SIGKILL) at given moments; `test_job.py` starts this as a process.

    python job_runner.py JOB_FOLDER OUTPUT RECIPE

For each MOMENT on standard input a process of its own goes on with the job; how it ended is printed, -9 for a kill. (It is
forked from this one, which has done nothing but import: that takes longer than the job.) MOMENT counts files: the process
dies when that many have been written under their temporary name, before the rename on odd moments and after it on even
ones. 0 never dies.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit.recipes import stages


def die_at(moment: int) -> None:
    rename, count = Path.replace, 0

    def counted(self, target):
        nonlocal count
        count += 1
        if count == moment and moment % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(self, target)
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.replace = counted


def main() -> None:
    folder, output, recipe = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    stages.CHECKPOINT_SECONDS = 0.0  # a checkpoint after every step
    stages.CHECKPOINT_SHARE = 1e9
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work(folder, output, recipe, int(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def work(folder: Path, output: Path, recipe: str, moment: int) -> None:
    pipeline = new_pipeline()
    die_at(moment)
    with vq4dit.Job.open(folder, quick_settings(recipe=recipe), pipeline, resume=True) as job:
        vq4dit.save(vq4dit.run(job, pipeline), output)
        job.remove()


if __name__ == "__main__":
    main()
