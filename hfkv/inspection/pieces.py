"""Tokens as text: what each one adds, byte-level pieces of a character included."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 8
"""Tokens that are waited for to complete a character; what is invalid after that stands as it is."""


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that every token adds to those before it; joined, it is the decoded whole.

    A token that holds only some bytes of a character gives "", and the token that completes it the character.
    """
    texts: list[str] = []
    before, waiting = 0, 0  # ids[before:waiting] have their text and give context, ids[waiting:] wait for theirs
    for end in range(1, len(ids) + 1):
        known = _decode(tokenizer, ids[before:waiting])
        text = _decode(tokenizer, ids[before:end])
        last = end == len(ids) or end - waiting >= LONGEST_CHARACTER
        if last or (len(text) > len(known) and not text.endswith(REPLACEMENT)):
            texts += [""] * (end - waiting - 1) + [text[len(known) :]]
            before, waiting = waiting, end
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
