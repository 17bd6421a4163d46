"""The shortest way: one line for the model, and every `generate` uses a compressed cache."""

import argparse

import hfkv
from hfkv.demo import smollm2

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--tokens", type=int, default=60)
args = parser.parse_args()

model, tokenizer = smollm2.load(args.model, dtype="auto", attn_implementation="sdpa")
hfkv.enable(model, hfkv.LeanKVConfig.preset("balanced"))

inputs = tokenizer("A key/value cache is", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
print(tokenizer.decode(out[0], skip_special_tokens=True))
