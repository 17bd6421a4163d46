"""Error of attention on structured synthetic keys and values, by bits, rotation and mean shift.

Streams (`hfkv/synthetic.py`) carry one trait of real caches each, and all of them; keys and values go through the
cache's own codecs. Every figure is the mean over seeds.

    python benchmarks/synthetic.py
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator

import torch
from rows import RESULTS
from tqdm import tqdm

from hfkv import LeanKVConfig
from hfkv.calibrate.coding import Coding, recoded
from hfkv.synthetic import STREAMS, Stream, stream

TABLE = RESULTS / "synthetic.csv"
BITS = (8, 4, 3, 2)
BASES = tuple(itertools.product((False, True), repeat=2))  # rotated, shifted


def errors(one: Stream) -> Iterator[tuple[tuple[int, int, bool, bool], tuple[float, float]]]:
    """(key bits, value bits, rotated, shifted) -> (relative RMS error of the output, KL of the attention)."""
    config = LeanKVConfig()
    for rotated, shifted in BASES:
        keys = {bits: recoded(one.k, Coding("key", bits, 0.0, rotated, shifted), None, config) for bits in BITS}
        values = {bits: recoded(one.v, Coding("value", bits, 0.0, rotated), None, config) for bits in BITS}
        for key_bits, value_bits in itertools.product(BITS, repeat=2):
            yield (key_bits, value_bits, rotated, shifted), one.errors(keys[key_bits], values[value_bits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[tuple, list[tuple[float, float]]] = {}
    for name, seed in tqdm(list(itertools.product(STREAMS, range(args.seeds)))):
        for key, pair in errors(stream(STREAMS[name], seed)):
            found.setdefault((name, *key), []).append(pair)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["stream", "key_bits", "value_bits", "rotated", "shifted", "output_error", "attention_kl", "seeds"]
        )
        for (name, key_bits, value_bits, rotated, shifted), pairs in found.items():
            output, kl = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            writer.writerow(
                [name, key_bits, value_bits, int(rotated), int(shifted), f"{output:.4f}", f"{kl:.3g}", args.seeds]
            )
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
