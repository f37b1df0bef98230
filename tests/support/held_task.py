"""A task of a server's queue that goes on only when a test lets it."""

import threading

from vq4dit.progress import Progress

PATIENCE = 120.0


class Steps:
    """A task of some steps, each of which it must be allowed; a time slice ends when the budget says so."""

    def __init__(self, project, log, count=1, left=None):
        self.project, self.log, self.count, self.left = project, log, count, left
        self.begun, self.may_go_on = threading.Event(), threading.Semaphore(0)

    def lined_up(self):
        return self.project.lined_up()

    def work(self, budget, check_stop):
        self.begun.set()
        while self.count:
            assert self.may_go_on.acquire(timeout=PATIENCE)
            self.count -= 1
            self.log.append(self.project.settings.seed)
            check_stop(Progress("cluster", 1, 2))
            if self.count and not budget.allows(0.0):
                return True
        return False

    def seconds_left(self):
        return self.left

    def go(self, steps=1):
        self.may_go_on.release(steps)
        return self
