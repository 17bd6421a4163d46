"""A chat whose turns share one compressed cache: every turn computes its new tokens only."""

import argparse

import torch

from hfkv import LeanKVCache
from hfkv.demo import smollm2
from hfkv.demo.dialogue import continued, next_turn, render
from hfkv.demo.texts import documentation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--say", action="append", help="a turn of yours; may be repeated")
parser.add_argument("--tokens", type=int, default=60)
args = parser.parse_args()
text = f"Here is some documentation.\n\n{documentation()[:5000]}\n\n"
turns = args.say or [text + "What is it about?", "What is an optional argument?", "Say that in one short sentence."]

model, tokenizer = smollm2.load(args.model, dtype="auto", attn_implementation="leankv")
cache = LeanKVCache()

ids: list[int] = []
for turn in turns:
    ids = continued(ids, next_turn(tokenizer, turn)) if ids else render(tokenizer, [turn])
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=args.tokens,
        do_sample=False,
    )
    answer = out[0, len(ids) :].tolist()
    ids = ids + answer
    print(f"\n> {turn[-60:].strip()}\n{tokenizer.decode(answer, skip_special_tokens=True).strip()}")
print(f"\n{cache.report().ratio:.1%} of the exact cache's bytes for {len(ids)} tokens")
