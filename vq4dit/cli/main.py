"""`python -m vq4dit`: inspect, quantize, sample, compare and push from the terminal.

Exit codes: 0 done; 1 something a person can mend, told in one paragraph; 2 wrong usage; 130 interrupted with Ctrl-C.
Figures go to standard output (`--json` for machines), progress and errors to standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress

from rich.markup import escape

from vq4dit.cli.compare import add_compare_arguments, compare_command
from vq4dit.cli.inspect import add_inspect_arguments, inspect_command
from vq4dit.cli.push import add_push_arguments, push_command
from vq4dit.cli.quantize import add_quantize_arguments, quantize_command
from vq4dit.cli.sample import add_sample_arguments, sample_command
from vq4dit.cli.streams import hand_over
from vq4dit.cli.terminal import Parser, Report, errors, notes
from vq4dit.errors import VQ4DiTError
from vq4dit.interrupts import code_of
from vq4dit.memory import is_out_of_memory, out_of_memory

FAILURES = (VQ4DiTError, ValueError, OSError, MemoryError, RuntimeError)
GO_ON = {"quantize": "; go on with the same command and --resume", "push": "; go on with the same command"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        with notes(errors()):
            report = args.command(args)
    except FAILURES as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):  # a fault of ours
            raise
        say(f"[bold red]error:[/] {_reason(error)}")
        return 1
    except KeyboardInterrupt as error:
        say("interrupted" + GO_ON.get(args.name, ""))
        return code_of(error)
    return tell(report, is_all=args.name == "inspect")


def tell(report: Report, is_all: bool) -> int:
    """Tell on standard output what was done. From here on nothing fails any more but the telling; returns the exit code.

    Args:
        is_all: the report is all that was asked for.
    """
    try:
        report()
        hand_over()
    except BrokenPipeError:  # who read it has seen enough
        with suppress(OSError):
            hand_over()
    except FAILURES as error:
        with suppress(OSError):
            hand_over()
        if is_all:
            say(f"[bold red]error:[/] the figures could not be told ({_reason(error)}): give standard output another place")
            return 1
        say(f"the work is done and saved; only its report could not be told ({_reason(error)})")
    except KeyboardInterrupt as error:
        say("interrupted" + ("" if is_all else "; the work is done and saved"))
        return code_of(error)
    return 0


def say(line: str) -> None:
    """One line on standard error."""
    errors().print(line, highlight=False, soft_wrap=True)


def _reason(error: BaseException) -> str:
    text = out_of_memory(error) if not isinstance(error, VQ4DiTError) and is_out_of_memory(error) else str(error)
    return escape(" ".join(text.splitlines()))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m vq4dit", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="name", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], Report], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print the figures as JSON")
        return sub

    inspecting = "Which layers would be quantized, and the bytes at 2, 3 and 4 bits. Reads headers only."
    add_inspect_arguments(add("inspect", inspect_command, inspecting))
    add_quantize_arguments(add("quantize", quantize_command, "Quantize a model into a folder that diffusers loads."))
    add_sample_arguments(add("sample", sample_command, "Images from an original or a quantized model."))
    comparing = "Same-seed pictures and figures of an original and a quantized model."
    add_compare_arguments(add("compare", compare_command, comparing))
    add_push_arguments(add("push", push_command, "Publish a quantized model on the Hugging Face Hub, with a card."))
    return parser
