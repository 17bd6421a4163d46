"""Conversations as token ids: what can be compressed before anything is asked, what is asked, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hfkv.demo.measures import equal_tokens

_ASK = "Here are some documents. I am going to ask questions about them, please answer in one short sentence."
_READY = "I have read the documents."
_LABELS = {"user": "Question: ", "assistant": "Answer: "}


@dataclass(frozen=True)
class Question:
    """What the user asks, and how the answer begins, where a small model is helped to stay on the subject."""

    text: str
    begun: str = ""


class Dialogue:
    """A document and the questions about it.

    `prompt` is what all the questions have in common, so it holds nothing of them; `questions[i]` follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, document: str, questions: list[Question]):
        opening = [f"{_ASK}\n\n{document}", _READY]
        other = render(tokenizer, [*opening, "?"])
        asked = [render(tokenizer, [*opening, question.text]) for question in questions]
        common = min(equal_tokens(ids, other) for ids in asked)
        self.prompt: list[int] = other[:common]
        begun = [tokenizer(question.begun, add_special_tokens=False)["input_ids"] for question in questions]
        self.questions: list[list[int]] = [ids[common:] + start for ids, start in zip(asked, begun, strict=True)]


def render(tokenizer: PreTrainedTokenizerBase, turns: list[str]) -> list[int]:
    """Token ids of turns of the user and the assistant, the user first and last, up to where the answer begins.

    In the model's chat template; as plain text with "Question:" and "Answer:" where it has none.
    """
    roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not tokenizer.chat_template:
        lines = [_LABELS[role] + turn for role, turn in zip(roles, turns, strict=True)]
        return tokenizer("\n\n".join([*lines, "Answer:"]))["input_ids"]
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def next_turn(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids that follow any answer: its end, where the template marks one, and the next question."""
    yes, no = (render(tokenizer, ["?", answer, question]) for answer in ("Yes", "No"))
    return yes[len(yes) - equal_tokens(yes[::-1], no[::-1]) :]


def continued(ids: list[int], turn: list[int]) -> list[int]:
    """`ids`, which end with an answer, and the next turn; an end-of-answer token that both carry is written once."""
    return ids + turn[1:] if ids[-1] == turn[0] else ids + turn
