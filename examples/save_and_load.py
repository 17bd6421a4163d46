"""A long text, processed once: its cache is written to a file, and a later run asks its question at once."""

import argparse
import time
from pathlib import Path

import torch

from hfkv import LeanKVCache
from hfkv.demo import smollm2
from hfkv.demo.texts import documentation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--file", type=Path, default=Path("document.safetensors"))
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

model, tokenizer = smollm2.load(args.model, dtype="auto", attn_implementation="leankv")
text = tokenizer(documentation(), truncation=True, max_length=1500, return_tensors="pt")["input_ids"]
question = tokenizer("\n\nIn short, the text above says that", return_tensors="pt", add_special_tokens=False)

start = time.perf_counter()
if args.file.exists():
    cache = LeanKVCache.load(args.file)
    print(f"read {args.file} in {time.perf_counter() - start:.1f} s")
else:
    cache = LeanKVCache()
    with torch.no_grad():
        model(input_ids=text, past_key_values=cache, logits_to_keep=1)
    cache.save(args.file)
    print(f"processed {text.shape[1]} tokens in {time.perf_counter() - start:.1f} s, {args.file} has what they became")

ids = torch.cat([text, question["input_ids"]], 1)
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=args.tokens, do_sample=False
)
print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
