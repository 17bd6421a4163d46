"""The command line: `python -m hfkv demo`, `bench`, `eval`, `lm-eval`, `calibrate`, `inspect`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from dataclasses import dataclass

from hfkv.paging.pool import OutOfPages

LM_EVAL = "lm-eval"


@dataclass(frozen=True)
class Command:
    """A command: where its arguments and its work are; both are imported only when they are needed.

    Attributes:
        options: module with `add_arguments(parser)`.
        work: module with `run`, which takes the arguments, or what its `prepare` makes of them (`prepares`).
        extra: the extra of the package that brings what `work` imports.
        errors: what the user can mend; anything else is a bug and keeps its traceback.
    """

    name: str
    help: str
    options: str
    work: str
    extra: str
    prepares: bool = False
    errors: tuple[type[Exception], ...] = (ImportError, OSError, ValueError)

    def __call__(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit status."""
        try:
            work = importlib.import_module(self.work)
        except ModuleNotFoundError as error:
            needs = f"Install what it needs with: pip install 'hfkv[{self.extra}]'"
            print(f"hfkv {self.name}: {error}. {needs}", file=sys.stderr)
            return 2
        try:
            if not self.prepares:
                return work.run(args)
            ready = work.prepare(args)
        except self.errors as error:
            print(f"hfkv {self.name}: {error}", file=sys.stderr)
            return 2
        return work.run(ready)


COMMANDS = (
    Command(
        "demo",
        "the exact cache and LeanKV side by side on a real model",
        "hfkv.demo.options",
        "hfkv.demo.run",
        "demo",
        prepares=True,
    ),
    Command(
        "bench",
        "times and bytes on this device beside the exact caches, with the goals",
        "hfkv.bench.run",
        "hfkv.bench.run",
        "plot",
    ),
    Command(
        "eval",
        "accuracy against physical bytes beside the peers, on your own model",
        "hfkv.eval.options",
        "hfkv.eval.run",
        "eval",
        prepares=True,
    ),
    Command(
        "calibrate",
        "the config for a model and a target, found by measuring it",
        "hfkv.calibrate.run",
        "hfkv.calibrate.run",
        "demo",
    ),
    Command(
        "inspect",
        "one HTML page of what a cache keeps of a prompt, by layer and head",
        "hfkv.inspection.run",
        "hfkv.inspection.run",
        "demo",
        errors=(ImportError, OSError, OutOfPages, TypeError, ValueError),
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2: the user can mend it, and the message says how)."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == [LM_EVAL]:  # its options are lm_eval's own
        return _lm_eval(given[1:])
    args = _parser(given[:1]).parse_args(given)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # model text on a terminal without UTF-8
    return args.command(args)


def _parser(named: list[str]) -> argparse.ArgumentParser:
    """All commands, and the arguments of the one that is `named`: what the others import is not needed."""
    parser = argparse.ArgumentParser(
        prog="python -m hfkv", description="A compressed KV cache for HuggingFace generate."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help)
        own.set_defaults(command=command)
        if command.name in named:
            importlib.import_module(command.options).add_arguments(own)
    commands.add_parser(LM_EVAL, help="lm_eval with the model hfkv; its options follow", add_help=False)
    return parser


def _lm_eval(options: list[str]) -> int:
    try:
        from hfkv.eval import harness
    except ModuleNotFoundError as error:
        print(f"hfkv {LM_EVAL}: {error}. Install it with: pip install 'hfkv[eval]'", file=sys.stderr)
        return 2
    try:
        harness.main(options)
    except ValueError as error:
        print(f"hfkv {LM_EVAL}: {error}", file=sys.stderr)
        return 2
    return 0
