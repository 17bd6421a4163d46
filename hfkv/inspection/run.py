"""`python -m hfkv inspect`: from the command line's arguments to the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from hfkv.config import PRESETS, LeanKVConfig
from hfkv.inspection.examine import LATER, examine
from hfkv.inspection.page import write_page

_SEED = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    parser.add_argument(
        "--model", default="smollm2", help="name or path for from_pretrained (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="a text of your own instead of documentation text")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--tokens", type=int, default=1000, help="length of the documentation text (default: %(default)s)"
    )
    setting = parser.add_mutually_exclusive_group()
    setting.add_argument("--preset", choices=list(PRESETS), default="balanced", help="default: %(default)s")
    setting.add_argument("--config", metavar="JSON", help="LeanKVConfig of your own: JSON text or the path of a file")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="decode N tokens too and look again (default: %(default)s)"
    )
    parser.add_argument(
        "--later",
        type=int,
        default=LATER,
        metavar="N",
        help="later tokens whose attention judges what is kept (default: %(default)s)",
    )
    parser.add_argument("--out", default="inspect.html", help="the page to write (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        ValueError, OSError, ImportError: what is wrong with the arguments, in words for the user.
    """
    from hfkv.demo import smollm2

    config = LeanKVConfig.from_json(args.config) if args.config else LeanKVConfig.preset(args.preset)
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: give the name of the page to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = _read(args.prompt_file) if args.prompt_file else None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = smollm2.load(args.model, dtype="auto")
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    ids, following = _prompt(args, text, tokenizer)
    made = examine(
        model, tokenizer, ids, config, generate=args.generate, later=args.later, following=following, say=_say
    )
    write_page(made, out)
    report = made.moments[-1].report
    print(
        f"{made.model}, {made.setting}: {report.physical_bytes:,} of {report.exact_bytes:,} bytes ({report.ratio:.3f})"
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in any browser")
    return 0


def _prompt(
    args: argparse.Namespace, text: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """The prompt's token ids and, of documentation text, those that follow."""
    from hfkv.demo.texts import continuations

    if text is None:
        if args.chat:
            raise ValueError("--chat is about a text of your own: give it with --prompt-file")
        made = next(continuations(tokenizer, args.tokens, max(args.later, 1), _SEED))
        return made.context, made.following
    if not args.chat:
        return tokenizer(text, verbose=False)["input_ids"], []
    if not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {args.model} has no chat template")
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"], []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
