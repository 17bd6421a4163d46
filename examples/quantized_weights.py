"""Weights in 4 bits and a compressed cache: what both take together. Needs `pip install hfkv[bitsandbytes]`."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import smollm2
from hfkv.demo.texts import documentation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--preset", default="balanced")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

path = smollm2.folder() if args.model == smollm2.NAME else args.model
tokenizer = AutoTokenizer.from_pretrained(path)
exact = AutoModelForCausalLM.from_pretrained(path, dtype="auto").get_memory_footprint()
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(
    path, dtype="auto", quantization_config=four_bit, attn_implementation="leankv"
)

inputs = tokenizer(documentation(), truncation=True, max_length=1500, return_tensors="pt").to(model.device)
cache = LeanKVCache(LeanKVConfig.preset(args.preset))
out = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.tokens, do_sample=False)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

report, weights = cache.report(), model.get_memory_footprint()
print(f"\nweights  {weights / 2**20:8.1f} of {exact / 2**20:8.1f} MiB")
print(
    f"cache    {report.physical_bytes / 2**20:8.1f} of {report.exact_bytes / 2**20:8.1f} MiB, {report.tokens:,} tokens"
)
joint, whole = weights + report.physical_bytes, exact + report.exact_bytes
print(f"together {joint / 2**20:8.1f} of {whole / 2**20:8.1f} MiB: {joint / whole:.1%}")
