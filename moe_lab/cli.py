"""The `moe-lab` command. A sub-command's module is imported only when it is asked for, so the rest stays light."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from moe_lab import __version__
from moe_lab.paths import CourseError

COMMANDS = {
    "lab": ("moe_lab.course.lab", "open the course in JupyterLab"),
    "doctor": ("moe_lab.course.doctor", "say what works on this machine, and what to do about the rest"),
    "progress": ("moe_lab.course.progress", "show which exercises you have solved"),
    "test": ("moe_lab.course.suite", "run lint, all tests (also of kernels, and in a browser) and every notebook"),
    "train": ("moe_lab.runs", "train a language model in a run folder of its own"),
    "count": ("moe_lab.commands.count", "count a model's parameters, bytes and FLOPs, from its name or config.json"),
    "claims": ("moe_lab.commands.claims", "show what articles say about MoE, and what settles it"),
    "bench": ("moe_lab.bench", "measure the dispatch variants side by side"),
    "gpu": ("moe_lab.gpu", "test and measure the kernels on this machine's graphics card"),
    "build": ("moe_lab.course.builder", "make notebooks/ and solutions/ from lessons/"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns its exit status.

    It is 2 where a sentence said what is wrong, 130 after Ctrl-C, and 141 where nobody reads what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a redirected Windows console cannot write "×": better "?" than a traceback
            stream.reconfigure(errors="replace")
    try:
        parsed = _parser(sys.argv[1:] if arguments is None else arguments).parse_args(arguments)
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough; what is left goes nowhere, or Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of that sub-command alone which `arguments` start with."""
    parser = argparse.ArgumentParser(prog="moe-lab", description="From a dense FFN to a working MoE, in notebooks.")
    parser.add_argument("--version", action="version", version=f"moe-lab {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (module, says) in COMMANDS.items():
        command = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
        if name in arguments[:1]:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.main)
    return parser
