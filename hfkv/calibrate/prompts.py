"""What a calibration is measured on: contexts to compress, and what follows them."""

from __future__ import annotations

import random
from itertools import islice, zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hfkv.calibrate.recording import Prompt
from hfkv.demo.texts import continuations

NEXT, EXCERPT = 40, 24
"""Tokens that follow a context: those that the text goes on with, then an excerpt from the context, so that what no
recent query looks at counts too."""

LEAST = 200
"""Tokens of a text that is worth cutting."""

SEED = 2025


def generated(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int, seed: int = SEED) -> list[Prompt]:
    """`count` prompts of `tokens` tokens of documentation text, no two overlapping.

    Raises:
        ValueError: there is not so much text.
    """
    rng = random.Random(seed)
    texts = islice(continuations(tokenizer, tokens, NEXT, seed), count)
    found = [(text.context, _followed(text.context, text.following, rng)) for text in texts]
    if len(found) < count:
        raise ValueError(f"{count} prompts of {tokens} tokens: the documentation text holds {len(found)} of them")
    return found


def from_files(
    tokenizer: PreTrainedTokenizerBase, files: list[Path], tokens: int, count: int, seed: int = SEED
) -> list[Prompt]:
    """`count` prompts of `tokens` tokens cut from text files, taken in turn; shorter files give shorter prompts.

    Raises:
        ValueError: a file is too short to be cut, or not text.
    """
    rng = random.Random(seed)
    prompts = [_cut(tokenizer, file, tokens, rng) for file in files]
    rounds = zip_longest(*prompts)
    return list(islice((prompt for one in rounds for prompt in one if prompt), max(count, len(files))))


def _cut(tokenizer: PreTrainedTokenizerBase, file: Path, tokens: int, rng: random.Random) -> list[Prompt]:
    try:
        ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error.reason}): give text files as --prompts") from error
    if len(ids) < LEAST:
        raise ValueError(f"{file} holds {len(ids)} tokens: a prompt needs at least {LEAST}")
    width = min(tokens, len(ids) - NEXT)
    contexts = [
        (ids[i : i + width], ids[i + width :][:NEXT]) for i in range(0, len(ids) - width - NEXT + 1, width + NEXT)
    ]
    return [(context, _followed(context, following, rng)) for context, following in contexts]


def _followed(context: list[int], following: list[int], rng: random.Random) -> list[int]:
    start = rng.randrange(len(context) - EXCERPT)
    return following + context[start : start + EXCERPT]
