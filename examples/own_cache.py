"""A cache of your own: made here, given to `generate`, and asked afterwards what it holds."""

import argparse

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import smollm2
from hfkv.demo.texts import documentation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

model, tokenizer = smollm2.load(args.model, dtype="auto", attn_implementation="leankv")
inputs = tokenizer(documentation(), truncation=True, max_length=1500, return_tensors="pt")

cache = LeanKVCache(LeanKVConfig.preset(args.preset))
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.tokens, do_sample=False)

print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.report())
