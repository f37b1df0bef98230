"""The app's memory over many jobs: each is quantized and drawn in Chromium, with another seed.

    python tests/benchmarks/memory.py [--jobs 50] [--recipe kmeans]

Takes a tiny model, so that what is seen is what the server forgets to give back. Bar: after all jobs at most 15 % more than
after five.
"""

import argparse
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).parents[2]
sys.path[:0] = [str(HOME), str(HOME / "tests" / "support")]

from app_server import AppServer  # noqa: E402
from browsing import Visitor, chromium  # noqa: E402
from server_memory import memory_after_jobs  # noqa: E402
from tiny import new_pipeline  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--recipe", default="kmeans", choices=["best", "paper", "kmeans"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        new_pipeline().save_pretrained(Path(folder) / "root" / "tiny")
        with AppServer(Path(folder) / "jobs", "--root", str(Path(folder) / "root")) as server:
            visitor = Visitor(browser, server.url).arrive(f"?model=folder:tiny&recipe={args.recipe}")
            after = []
            for num_bytes in memory_after_jobs(server, visitor, args.jobs):
                after.append(num_bytes)
                if len(after) in (1, 2, 5) or len(after) % 10 == 0:
                    print(
                        f"after {len(after):3} jobs: {num_bytes / 1e6:.0f} MB, {num_bytes / after[min(4, len(after) - 1)]:.3f}"
                    )
    print(f"after {args.jobs} jobs {after[-1] / after[4]:.3f} of what it was after five (bar: 1.15)")


if __name__ == "__main__":
    main()
