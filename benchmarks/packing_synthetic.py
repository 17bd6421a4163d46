"""What packing saves on structured synthetic streams: outlier channels, channel offsets, sinks; rotated and not.

Plain codes have as many bits as the same step needs, so packed and plain have the same error.

    python benchmarks/packing_synthetic.py
"""

from __future__ import annotations

import argparse

import torch
from packing import Coding, all_sizes, coded, total
from rows import RESULTS, merge_csv
from torch import Tensor
from tqdm import tqdm

from hfkv.packing import REPACKS

TABLE = RESULTS / "packing_synthetic.csv"
HEADS, TOKENS = 8, 1024
CODES = ("4", "0.1", "0.2", "h4", "h0.1", "h0.2", "h2")
STREAMS = ("normal", "offsets", "outlier channels", "slow channels", "sinks", "clusters")


def stream(kind: str, dim: int) -> Tensor:
    """Vectors [heads, tokens, dim] of unit variance from token to token, but for what the kind says."""
    x = torch.randn(HEADS, TOKENS, dim)
    if kind == "offsets":  # as biases and RoPE's slow features leave them in keys
        x += 2 * torch.randn(HEADS, 1, dim)
    elif kind == "outlier channels":
        x[..., : dim // 32] = 10 * x[..., : dim // 32] + 20
    elif kind == "slow channels":  # neighbouring tokens are alike
        x = x.cumsum(1) / torch.arange(1, TOKENS + 1)[:, None] ** 0.5
    elif kind == "sinks":  # the first tokens are far from all others
        x[:, :4] *= 8
    elif kind == "clusters":
        centres = 2 * torch.randn(HEADS, 8, dim)
        x = 0.5 * x + centres.gather(1, torch.randint(0, 8, (HEADS, TOKENS, 1)).expand(-1, -1, dim))
    return x


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = []
    for kind in tqdm(STREAMS):
        for dim in (64, 128):
            x = stream(kind, dim)
            for name in CODES:
                coding = Coding.of(name)
                back, codes, bits = coded(coding, x, False)
                assert codes is not None
                error = float((back - x).norm() / x.norm())
                sizes = all_sizes([coding, None], [[codes], [codes[..., :0]]], [bits, 0])
                plain = total(sizes["plain"], False)
                row = {"stream": kind, "dim": dim, "code": name, "error": f"{error:.4f}", "plain": f"{plain:.2f}"}
                table.append(row | {how: f"{total(sizes[how], True):.2f}" for how in REPACKS})
    merge_csv(TABLE, table, by=("stream", "dim", "code"))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
