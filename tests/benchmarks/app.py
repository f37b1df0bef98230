"""How the app feels: the whole way of a newcomer through the page in Chromium, with a stop-watch.

    python tests/benchmarks/app.py [--recipe best]

Starts `python app.py` on loopback, quantizes the bundled model at 2 bits, reloads the page in the middle, draws pairs,
downloads the packed model and loads it with diffusers in another process. "Longest silence" is the longest time between two
messages of the running job that reached Chromium, and between two changes that one could see. The time left is read from the
page every second and compared with what really was left. Screenshots are written to the folder VQ4DIT_SCREENSHOTS.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

HOME = Path(__file__).parents[2]
sys.path[:0] = [str(HOME), str(HOME / "tests" / "support")]  # the tests' own steps through the page

from app_server import AppServer  # noqa: E402
from browsing import Visitor, chromium  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

WATCH = """() => { window.longestSilence = 0; let last = performance.now();
new MutationObserver(() => { const now = performance.now();
  if (document.querySelector('#progress .running')) window.longestSilence = Math.max(window.longestSilence, now - last);
  last = now; }).observe(document.querySelector('#run'), {subtree: true, childList: true, characterData: true}); }"""


class Silence:
    """The longest time without a word from the server, from now on."""

    def __init__(self, visitor: Visitor):
        self.visitor, self.times = visitor, []  # in Chromium's own seconds
        session = visitor.context.new_cdp_session(visitor.page)
        session.send("Network.enable")
        for event in ("Network.eventSourceMessageReceived", "Network.dataReceived"):
            session.on(event, lambda message: self.times.append(message["timestamp"]))
        visitor.page.evaluate(WATCH)

    def told(self) -> str:
        heard = max(after - before for before, after in pairwise(self.times))
        seen = float(self.visitor.page.evaluate("window.longestSilence")) / 1000
        return f"{len(self.times)} messages, longest silence {heard:.2f} s, on the screen {seen:.2f} s"


UNITS = {"s": 1, "min": 60, "h": 3600}
PATIENCE_SECONDS = 3600.0


class TimeLeft:
    """What the page says is left, second by second."""

    def __init__(self, begun: float):
        self.begun, self.told, self.first_counter = begun, list[tuple[float, float]](), 0.0

    def read(self, text: str) -> None:
        now = time.monotonic() - self.begun
        if not self.first_counter and re.search(r"\d+ of \d+", text):
            self.first_counter = now
        if found := re.search(r"about ([\w ]+) left", text):
            parts = re.findall(r"(\d+) (s|min|h)", found[1])
            self.told.append((now, sum(int(number) * UNITS[unit] for number, unit in parts)))

    def report(self, end: float) -> str:
        ratios = [left / (end - at) for at, left in self.told if end - at >= 3]  # it is told in whole seconds
        within = sum(2 / 3 <= ratio <= 4 / 3 for ratio in ratios)
        return (
            f"first named counter: {self.first_counter:.1f} s; first time left: {self.told[0][0]:.1f} s; of {len(ratios)} "
            f"readings {100 * within / len(ratios):.0f} % within a third, told / real {min(ratios):.2f} to {max(ratios):.2f}"
        )


def watch_until(visitor: Visitor, left: TimeLeft, end: float) -> None:
    """Read the progress once a second (at first as often as it goes), until it is done or the time is over."""
    while time.monotonic() < end and not visitor.page.locator("#progress .done").count():
        left.read(visitor.text("#progress"))
        visitor.page.wait_for_timeout(1000 if left.told else 50)


def walk(server: AppServer, visitor: Visitor, recipe: str, folder: Path) -> None:
    clock = time.monotonic
    print(f"server answers: {server.seconds_to_start:.1f} s")
    begun = clock()
    visitor.arrive(f"?recipe={recipe}&model=assets/emoji-dit")
    print(f"page usable: {clock() - begun:.1f} s")
    visitor.shoot("first-screen")

    begun = clock()
    visitor.press("#start")
    left, silence = TimeLeft(begun), Silence(visitor)
    watch_until(visitor, left, begun + (20.0 if recipe != "kmeans" else 2.0))
    print(f"before the reload: {silence.told()}")
    visitor.arrive()
    visitor.see("#progress")
    silence = Silence(visitor)
    watch_until(visitor, left, begun + PATIENCE_SECONDS)
    seconds = clock() - begun
    expect(visitor.page.locator("#progress .done")).to_contain_text("is packed")
    print(f"packed, a reload included: {seconds:.1f} s; after the reload: {silence.told()}\n{left.report(seconds)}")

    begun = clock()
    visitor.press("#draw")
    visitor.see("#slider-box .compare")
    print(f"first pair: {clock() - begun:.1f} s")
    visitor.see("#figures", "noise error")
    print(f"all pairs and figures: {clock() - begun:.1f} s\n  {' '.join(visitor.text('#figures').split())}")
    visitor.open("#grid-box")
    visitor.see("#grid img")
    visitor.open("#layers-box")
    visitor.shoot("compared")

    taken = visitor.download(folder)
    code = (
        "import sys, vq4dit; from diffusers import DiTPipeline; "
        "print(DiTPipeline.from_pretrained(sys.argv[1])([5]).images[0].size)"
    )
    drawn = subprocess.run([sys.executable, "-c", code, str(taken)], cwd=HOME, capture_output=True, text=True, check=True)
    print(f"downloaded, loaded by diffusers: {drawn.stdout.strip()}\nerrors of the page: {visitor.errors or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best", choices=["best", "paper", "kmeans"])
    args = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        with AppServer(Path(folder) / "jobs", OMP_NUM_THREADS=threads) as server:
            walk(server, Visitor(browser, server.url), args.recipe, Path(folder))


if __name__ == "__main__":
    main()
