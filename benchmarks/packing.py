"""What packing saves (PackKV): bytes per token and KL of SmolLM2's real keys and values, by code and order of tokens.

A prompt's keys and values are captured once in float32; all but the newest 64 tokens are coded and decoded, and the
continuation is forced on them. Packing changes no code, so one KL stands beside the bytes of every order. A setting
names the code of keys and of values: `4`, `3`, `2` are the cache's own codes of so many bits, `m4` min/max with fp16
metadata, `0.1` error-bounded with that bound, `-` exact; a leading `h` rotates, `s` subtracts the mean key, `=` takes
one step for the whole head. Bytes are per token and KV head with scales, zeros, pack headers and addresses; tokens
short of a block of 64 count with plain codes. Rows are kept as they come, in `results/packing.jsonl`.

    python benchmarks/packing.py --texts 3 --tokens 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from rows import RESULTS, Rows, merge_csv
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hfkv.demo import smollm2
from hfkv.demo.measures import Agreement, agreement, mean_agreement
from hfkv.demo.texts import Continuation, continuations
from hfkv.kernels.packing import measure, repack
from hfkv.packing import BLOCK, PACK, REPACKS, PackedSide
from hfkv.quant import Codec, decode, encode, rotation, top_code, unpack_codes

TABLE, LAYERS, KEPT = RESULTS / "packing.csv", RESULTS / "packing_layers.csv", RESULTS / "packing.jsonl"
FOLLOWING = 96
WINDOW = 64
OBSERVED = 64
PACK_BYTES = 4 + 8
"""Sizes of a pack's sides, and its address."""
SCORE_BYTES = 6

SETTINGS = [
    # codes of plain tiers
    *("h4|h2", "h4|h3", "h4|h4", "h3|h2", "4|2", "4|3", "4|4", "m4|m2", "m4|m4", "h4|2", "4|h2"),
    # error-bounded, and the mean key subtracted
    *("0.1|0.2", "0.1|h2", "h0.15|h2", "sh4|h2"),
    # one side alone
    *("4|-", "h4|-", "h3|-", "0.05|-", "0.07|-", "0.1|-", "0.15|-", "0.2|-", "h0.1|-", "h0.15|-", "h0.2|-"),
    *("s0.1|-", "s0.15|-", "=0.07|-", "=0.1|-", "=0.15|-", "=0.2|-", "h=0.1|-", "h=0.15|-", "s=0.1|-"),
    *("-|2", "-|h2", "-|h3", "-|h4", "-|0.1", "-|0.15", "-|0.2", "-|0.3", "-|0.4", "-|h0.15", "-|h0.2", "-|h0.3"),
    *("-|=0.15", "-|=0.2", "-|=0.3", "-|=0.4", "-|h=0.2", "-|h=0.3"),
]


class Recorder:
    """An attention function that keeps the prompt's keys, values and last queries, then attends to what it is given.

    Attributes:
        past: (keys, values) [kv_heads, tokens, dim] by layer to attend to, or None to record.
    """

    def __init__(self) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.q: dict[int, Tensor] = {}
        self.past: dict[int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        layer, new = module.layer_idx, q.shape[2]
        if self.past is None:
            self.k[layer], self.v[layer], self.q[layer] = k[0], v[0], q[0, :, -OBSERVED:]
            hidden = None
        else:
            own_k, own_v = self.past[layer]
            k, v = torch.cat([own_k[None], k], 2), torch.cat([own_v[None], v], 2)
            hidden = torch.ones(new, k.shape[2], dtype=torch.bool).tril(k.shape[2] - new)
        terms = dict(scale=scaling, enable_gqa=True)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, hidden, is_causal=hidden is None, **terms)
        return out.transpose(1, 2), None


# ---- codes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Coding:
    """How one side is coded; see the settings in the module's docstring."""

    name: str
    rotated: bool
    shifted: bool
    common: bool
    minmax: bool
    bits: int
    bound: float

    @classmethod
    def of(cls, name: str) -> Coding | None:
        if name == "-":
            return None
        match = re.fullmatch(r"(s?)(h?)(=?)(m?)([0-9.]+)", name)
        if match is None:
            raise ValueError(f"setting {name!r}: write it as h4, 2, m4, 0.1, s0.1, h=0.2 or -")
        shift, rotate, common, minmax, number = match.groups()
        value = float(number)
        bits, bound = (int(value), 0.0) if value >= 1 else (top_code(value).bit_length(), value)
        return cls(name, bool(rotate), bool(shift), bool(common), bool(minmax), bits, bound)

    def codec(self, dim: int, value: bool) -> Codec:
        bits = self.bits if self.bits in (2, 3, 4, 8) else 8
        if self.bound:
            return Codec(bits, dim, "bounded", bound=self.bound)
        if self.minmax:
            return Codec(bits, dim, "minmax")
        return Codec(bits, dim, "fitted" if bits < 4 else "affine", unbiased=value)

    def meta_bytes(self, dim: int, packed: bool) -> int:
        if self.common:
            return 0 if packed else 1
        codec = self.codec(dim, False)
        return codec.scale_bytes + codec.zero_bytes

    def plain_bits(self) -> int:
        """Bits of a code in plain pages."""
        return self.bits if self.bits in (2, 3, 4) else 8


def coded(coding: Coding | None, x: Tensor, value: bool) -> tuple[Tensor, Tensor | None, int]:
    """x [heads, tokens, dim] -> (what its code stands for, codes uint8 [heads, tokens, dim], bits of a code)."""
    if coding is None:
        return x, None, 0
    dim = x.shape[-1]
    turn = rotation(dim, 0)[0] if coding.rotated else torch.eye(dim)
    mean = x.mean(1, keepdim=True) if coding.shifted else torch.zeros(1, 1, dim)
    flat = ((x - mean) @ turn).flatten(0, 1)
    if coding.common:
        back, codes = _common_step(flat.view(x.shape), coding.bound)
    else:
        codec = coding.codec(dim, value)
        parts = encode(codec, flat)
        back, codes = decode(codec, *parts), unpack_codes(parts[0], codec) if codec.bits < 8 else parts[0]
    codes = codes.view(x.shape)
    bits = max(1, int(codes.max()).bit_length()) if coding.bound else coding.bits
    return back.view(x.shape) @ turn.T + mean, codes, bits


def _common_step(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """One step for a head, `bound` of the median range of its tokens; codes count from the head's smallest number."""
    spread = x.amax(-1) - x.amin(-1)  # [heads, tokens]
    step = (spread.median(1).values * bound)[:, None, None]
    low = x.amin((1, 2), keepdim=True)
    step = torch.maximum(step, (x.amax((1, 2), keepdim=True) - low) / 255)
    codes = ((x - low) / step).round().clamp_(0, 255)
    return codes * step + low, codes.to(torch.uint8)


# ---- bytes -------------------------------------------------------------------------------------------------------


def side_sizes(coding: Coding | None, codes: list[Tensor], bits: int, order: Tensor | None) -> dict[str, float]:
    """Bytes per token of one side: `codes` a [heads, tokens, dim] of every layer, `order` int64 [blocks, 64]."""
    if coding is None:
        return {"payload": 0.0, "header": 0.0, "meta": 0.0}
    heads, tokens, dim = codes[0].shape
    plain = dim * coding.plain_bits() / 8
    if order is None:
        return {"payload": plain, "header": 0.0, "meta": float(coding.meta_bytes(dim, False))}
    blocks = block_codes(codes)
    blocks = blocks.gather(1, order[..., None].expand_as(blocks))
    side = PackedSide(dim, bits)
    size, header = 0.0, 0.0
    for part in blocks.split(512):
        _, _, own, raw = measure(side, part.unflatten(1, (-1, PACK)).flatten(0, 1))
        size, header = size + float(own.sum()), header + float((~raw).sum()) * side.header
    whole = tokens // BLOCK * BLOCK
    count, rest = len(codes) * heads * tokens, len(codes) * heads * (tokens - whole)
    return {
        "payload": (size - header + rest * plain) / count,
        "header": header / count,
        "meta": float(coding.meta_bytes(dim, True)),
    }


def block_codes(codes: list[Tensor]) -> Tensor:
    """[heads, tokens, dim] of every layer -> whole blocks [n, 64, dim]."""
    whole = codes[0].shape[1] // BLOCK * BLOCK
    return torch.cat([c[:, :whole].unflatten(1, (-1, BLOCK)).flatten(0, 1) for c in codes])


def all_sizes(codings: list[Coding | None], codes: list[list[Tensor]], bits: list[int]) -> dict[str, dict]:
    """By order (and `plain`): bytes per token of keys and of values, by part."""
    sizes = {"plain": [side_sizes(c, x, b, None) for c, x, b in zip(codings, codes, bits, strict=True)]}
    present = [block_codes(x) for c, x in zip(codings, codes, strict=True) if c is not None]
    empty = present[0][..., :0]
    pair = [block_codes(x) if c is not None else empty for c, x in zip(codings, codes, strict=True)]
    for how in REPACKS:
        order = torch.cat([repack(k, v, how) for k, v in zip(pair[0].split(256), pair[1].split(256), strict=True)])
        sizes[how] = [side_sizes(c, x, b, order) for c, x, b in zip(codings, codes, bits, strict=True)]
    return {how: dict(zip("kv", sides, strict=True)) for how, sides in sizes.items()}


def total(sizes: dict[str, dict[str, float]], packed: bool) -> float:
    """Bytes per token, keys and values, with everything a pack has of its own."""
    return sum(sum(side.values()) for side in sizes.values()) + (PACK_BYTES / PACK if packed else 0.0)


# ---- real keys and values ----------------------------------------------------------------------------------------


class Study:
    """Measures settings on one text; what is measured already is not measured again."""

    def __init__(self, model: PreTrainedModel, recorder: Recorder, rows: Rows) -> None:
        self.model, self.recorder, self.rows = model, recorder, rows

    @torch.no_grad()
    def measure(self, key: dict[str, Any], text: Continuation, settings: list[str], bar: tqdm) -> None:
        missing = [s for s in settings if self.rows.get({**key, "setting": s}) is None]
        bar.update(len(settings) - len(missing))
        if not missing:
            return
        self.recorder.past = None
        self.logits(text.context, 0)
        exact = {layer: (k, self.recorder.v[layer]) for layer, k in self.recorder.k.items()}
        self.recorder.past = exact
        wanted = self.logits(text.following, len(text.context))
        for setting in missing:
            self.rows.add({**key, "setting": setting}, self._one(setting, exact, wanted, text))
            bar.update()

    def _one(self, setting: str, exact: dict[int, tuple[Tensor, Tensor]], wanted: Tensor, text: Continuation) -> dict:
        codings = [Coding.of(name) for name in setting.split("|")]
        codes: list[list[Tensor]] = [[], []]
        bits, errors, past = [0, 0], [], {}
        for layer, pair in exact.items():
            back = []
            for side, (coding, x) in enumerate(zip(codings, pair, strict=True)):
                old, code, width = coded(coding, x[:, :-WINDOW], side == 1)
                back.append(torch.cat([old, x[:, -WINDOW:]], 1))
                bits[side] = max(bits[side], width)
                if code is not None:
                    codes[side].append(code)
            past[layer] = (back[0], back[1])
            errors.append(self._output_error(layer, pair, past[layer]))
        self.recorder.past = past
        close = agreement(wanted, self.logits(text.following, len(text.context)))
        sizes = all_sizes(codings, codes, bits)
        return {**dataclasses.asdict(close), "bits": bits, "sizes": sizes, "errors": errors}

    def _output_error(self, layer: int, exact: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
        """Relative RMS error of the last queries' attention output."""
        q = self.recorder.q[layer]
        k = exact[0]
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        terms = dict(attn_mask=hidden[None, None], enable_gqa=True)
        attend = torch.nn.functional.scaled_dot_product_attention
        a, b = (attend(q[None], pair[0][None], pair[1][None], **terms) for pair in (exact, other))
        return float((a - b).square().mean().sqrt() / a.square().mean().sqrt())

    def logits(self, ids: list[int], first: int) -> Tensor:
        positions = torch.arange(first, first + len(ids))[None]
        return self.model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0].float()


def tabulate(rows: Rows, keys: list[dict[str, Any]], settings: list[str], tokens: int) -> None:
    """Means over texts, one line per setting and order."""
    table, layers = [], []
    for setting in settings:
        found = [rows.get({**key, "setting": setting}) for key in keys]
        measured = [row for row in found if row is not None]
        if not measured:
            continue
        close = mean_agreement([Agreement(row["kl"], row["top1"], row["tokens"]) for row in measured])
        errors = torch.tensor([row["errors"] for row in measured]).mean(0)
        layers += [
            {"setting": setting, "tokens": tokens, "layer": i, "error": f"{float(e):.5f}"} for i, e in enumerate(errors)
        ]
        for how in ("plain", *REPACKS):
            parts: dict[str, float] = defaultdict(float)
            for row in measured:
                for side, own in row["sizes"][how].items():
                    for name, size in own.items():
                        parts[f"{side}_{name}"] += size / len(measured)
            whole = sum(total(row["sizes"][how], how != "plain") for row in measured) / len(measured)
            one_side = "-" in setting.split("|")
            table.append(
                {
                    "setting": setting,
                    "order": how,
                    "tokens": tokens,
                    "texts": len(measured),
                    "bytes_token": f"{whole:.3f}",
                    **{name: f"{size:.3f}" for name, size in parts.items()},
                    "with_score": f"{whole + SCORE_BYTES:.3f}",
                    "share": "" if one_side else f"{_share(whole, tokens):.4f}",
                    "error": f"{float(errors.square().mean().sqrt()):.5f}",
                    "kl": f"{close.kl:.5f}",
                    "top1": f"{close.top1:.4f}",
                }
            )
    merge_csv(TABLE, table, by=("setting", "order", "tokens"))
    merge_csv(LAYERS, layers, by=("setting", "tokens", "layer"))


def _share(token: float, tokens: int, dim: int = 64) -> float:
    """Share of the exact bf16 bytes, with the window's 96 slots."""
    return ((tokens - WINDOW) * token + 96 * 4 * dim) / (tokens * 4 * dim)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    recorder = Recorder()
    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", lambda *_, **__: None)
    model, tokenizer = smollm2.load(dtype=torch.float32, attn_implementation="recorder")
    study = Study(model, recorder, Rows(KEPT))
    texts = list(islice(continuations(tokenizer, args.tokens, FOLLOWING, args.seed), args.texts))
    keys = [{"what": "packing", "tokens": args.tokens, "seed": args.seed, "index": i} for i in range(args.texts)]
    with tqdm(total=len(texts) * len(args.settings), desc=f"{args.tokens} tokens") as bar:
        for key, text in zip(keys, texts, strict=True):
            study.measure(key, text, args.settings, bar)
    tabulate(study.rows, keys, args.settings, args.tokens)
    print(TABLE.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="codes of keys and values: 'h4|h2' '0.1|0.2'")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for setting in args.settings:
        names = setting.split("|")
        if len(names) != 2 or names == ["-", "-"]:
            parser.error(f"setting {setting!r}: one code of keys and one of values, as 'h4|h2'")
        for name in names:
            try:
                Coding.of(name)
            except (ValueError, ZeroDivisionError) as error:
                parser.error(str(error))
    if args.texts < 1 or args.tokens <= WINDOW + BLOCK or math.isnan(args.tokens):
        parser.error(f"--texts must be at least 1 and --tokens over {WINDOW + BLOCK}")
    return args


if __name__ == "__main__":
    main()
