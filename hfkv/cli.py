"""The command line: `python -m hfkv demo`, `python -m hfkv bench`."""

from __future__ import annotations

import argparse
import io
import sys

from hfkv.config import PRESETS


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (2: the user can mend it, and the message says how)."""
    parser = _parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # model text on a terminal without UTF-8
    return args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hfkv", description="A compressed KV cache for HuggingFace generate."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="the exact cache and LeanKV side by side on a real model")
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--model", default="smollm2", help="name or path for from_pretrained (default: SmolLM2-135M-Instruct)"
    )
    demo.add_argument("--prompt-file", help="a text of your own instead of documentation with hidden notes")
    demo.add_argument("--question", action="append", default=[], help="asked about --prompt-file; may be repeated")
    demo.add_argument("--preset", action="append", choices=list(PRESETS), help="setting to show; may be repeated")
    demo.add_argument("--config", metavar="JSON", help="LeanKVConfig of your own: JSON text or the path of a JSON file")
    demo.add_argument(
        "--tokens", type=int, default=1900, help="length of the documentation text (default: %(default)s)"
    )
    demo.add_argument("--out", default="demo-output", help="folder for the pictures (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a short prompt and one setting: under a minute")
    _add_bench(commands)
    _add_inspect(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from hfkv.bench.run import add_arguments

    bench = commands.add_parser("bench", help="times and bytes on this device beside the exact caches, with the goals")
    bench.set_defaults(command=_bench)
    add_arguments(bench)


def _bench(args: argparse.Namespace) -> int:
    from hfkv.bench import run

    try:
        return run.run(args)
    except ValueError as error:
        print(f"hfkv bench: {error}", file=sys.stderr)
        return 2


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from hfkv.inspection.run import add_arguments

    inspect = commands.add_parser("inspect", help="one HTML page of what a cache keeps of a prompt, by layer and head")
    inspect.set_defaults(command=_inspect)
    add_arguments(inspect)


def _inspect(args: argparse.Namespace) -> int:
    from hfkv.inspection import run
    from hfkv.paging.pool import OutOfPages

    try:
        return run.run(args)
    except (ImportError, OSError, OutOfPages, TypeError, ValueError) as error:
        print(f"hfkv inspect: {error}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    try:
        from hfkv.demo import run  # here and not above: it needs packages that hfkv itself does not
    except ModuleNotFoundError as error:
        print(f"hfkv demo: {error}. Install what the demo needs with: pip install 'hfkv[demo]'", file=sys.stderr)
        return 2
    try:
        demo = run.prepare(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"hfkv demo: {error}", file=sys.stderr)
        return 2
    run.run(demo)
    return 0
