"""The whole fault campaign: `python tests/faults`, or some kinds of it, or one case again: `--only ID`."""

import argparse
import signal
import time

from campaign import report, run_all, some_of_each_group
from kinds import KINDS
from worker import command_server


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--only", metavar="ID", help="run the cases whose ids start so")
    parser.add_argument("--short", action="store_true", help="only some of each group, as in CI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side (default: 2)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are deaf to Ctrl-C, and so are theirs
    failed = 0
    with command_server() as folder:
        for name, kind in KINDS.items():
            cases = [case for case in kind.cases(args.seed) if case.id.startswith(args.only or "")]
            if args.kinds and name not in args.kinds or not cases:
                continue
            if args.short:
                cases = some_of_each_group(cases, kind.SHORT, args.seed)
            started, found = time.monotonic(), []
            for case, complaints in run_all(cases, folder, args.jobs):
                found += complaints
                for complaint in complaints:
                    print(f'  --only "{case.id}" --seed {args.seed}: {complaint.kind}: {complaint.text}', flush=True)
            print(report(kind.TITLE, kind.COUNTED, cases, found, time.monotonic() - started), flush=True)
            failed += len(found)
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
