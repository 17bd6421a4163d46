"""What a cache holds, in physical bytes: every byte, by kind, layer, head and tier."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hfkv.config import Tier
from hfkv.paging.sealed import SealingPool

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache
    from hfkv.paging.packed import PackedLayer
    from hfkv.tokens import LayerTokens

PRUNED, LOW, HIGH, WINDOW = 0, 1, 2, 3
"""Entries of a tier map."""


@dataclass(frozen=True)
class LayerReport:
    """One layer: its bytes and tokens.

    Attributes:
        index: number of the layer.
        kind: class of the cache layer.
        compressed: whether it lives in packed pages.
        reason: why it is not compressed, else None.
        tiers: names of its tiers, best first, as K8V4.
        rotation: which rotations its vectors are coded under.
        tokens: per tier name, `window`, and `pruned`: int64 [batch, kv_heads].
        bytes: `codes`, `metadata`, `free_slots`, `window`, `queries`, `tables`, and of packed tiers `pack_headers`.
        head_bytes: int64 [batch, kv_heads], pages of the head.
        physical_bytes, exact_bytes: sums for this layer; exact_bytes is 0 where it is not compressed.
    """

    index: int
    kind: str
    compressed: bool
    reason: str | None
    tiers: tuple[str, ...] = ()
    rotation: str = "none"
    tokens: dict[str, Tensor] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    head_bytes: Tensor | None = None
    physical_bytes: int = 0
    exact_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """Bytes of a cache: `physical_bytes` is all that is held for its compressed layers, capacity and not fill.

    Attributes:
        physical_bytes: codes, metadata, free slots and pages, windows, queries, tables.
        exact_bytes: what the same tokens take in the model's dtype.
        plain_bytes: bytes of the layers that transformers keeps, not part of the two above.
        pool_free_bytes: free pages, unused chunks and chunk remainders.
        pack_slack_bytes: what pages of packs hold beside live packs.
        workspace_bytes: buffers of a step, which all layers of a device share.
        tokens: logical tokens per sequence.
        layers: one `LayerReport` each.
        backend: what runs the kernels, `triton` or `torch`; `none` before the first prompt.
    """

    physical_bytes: int
    exact_bytes: int
    plain_bytes: int
    pool_free_bytes: int
    pack_slack_bytes: int
    workspace_bytes: int
    tokens: int
    layers: list[LayerReport]
    backend: str

    @property
    def ratio(self) -> float:
        """physical_bytes / exact_bytes; 1.0 for an empty cache."""
        return self.physical_bytes / self.exact_bytes if self.exact_bytes else 1.0

    @property
    def compression(self) -> float:
        """exact_bytes / physical_bytes: how many times smaller the cache is."""
        return 1 / self.ratio

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by kind over all compressed layers; they add up to `physical_bytes`."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.bytes)
        slack = {"pack_slack": self.pack_slack_bytes} if self.pack_slack_bytes else {}
        return {**total, **slack, "free_pages": self.pool_free_bytes, "workspace": self.workspace_bytes}

    def __str__(self) -> str:
        compressed = [layer for layer in self.layers if layer.compressed]
        lines = [
            f"LeanKVCache: {self.tokens:,} tokens, {len(compressed)} of {len(self.layers)} layers compressed, "
            f"backend {self.backend}",
            f"  physical {_size(self.physical_bytes)} of {_size(self.exact_bytes)} exact: ratio {self.ratio:.3f}, "
            f"{self.compression:.2f}x smaller",
        ]
        lines += [
            f"  {name.replace('_', ' '):<11}{_size(size):>11}  {size / max(self.physical_bytes, 1):6.1%}"
            for name, size in self.bytes.items()
            if size
        ]
        if self.plain_bytes:
            lines.append(f"  not compressed beside it: {_size(self.plain_bytes)}")
        for reason, layers in _grouped(layer for layer in self.layers if layer.reason is not None).items():
            lines.append(f"  layers {layers} not compressed: {reason}")
        if compressed:
            for rotation in sorted({layer.rotation for layer in compressed}):
                lines.append(f"  rotation: {rotation}")
            lines += _table(compressed)
        return "\n".join(lines)

    __repr__ = __str__


def make_report(cache: LeanKVCache) -> Report:
    """Measure a cache; reads it only."""
    layers = [_layer_report(cache, index, layer) for index, layer in enumerate(cache.layers)]
    pools = cache.pools
    free = sum(pool.physical_bytes - pool.used_bytes for pool in pools)
    plain = sum(_plain_bytes(layer) for layer, made in zip(cache.layers, layers, strict=True) if not made.compressed)
    space = sum(workspace.nbytes for workspace in cache.workspaces.values())
    physical, exact = sum(layer.physical_bytes for layer in layers) + free + space, sum(x.exact_bytes for x in layers)
    backend = ", ".join(sorted({tokens.kernels.name for tokens in cache.compressed})) or "none"
    slack = sum(pool.slack_bytes for pool in pools if isinstance(pool, SealingPool))
    return Report(physical, exact, plain, free - slack, slack, space, cache.get_seq_length(), layers, backend)


def tier_map(cache: LeanKVCache, layer_idx: int) -> Tensor:
    """Where every token of a layer is, by logical position: uint8 [batch, kv_heads, tokens].

    The entries are PRUNED, LOW, HIGH, WINDOW. Pads were never stored and read as PRUNED. Without tiers packed tokens
    have no birth: all before the window is HIGH.

    Raises:
        ValueError: the layer is not compressed.
    """
    layer = cache.layers[layer_idx]
    held: LayerTokens | None = getattr(layer, "tokens", None)
    if held is None:
        reason = cache.plain_reasons.get(layer_idx, "it has no tokens yet")
        raise ValueError(f"layer {layer_idx} is not compressed: {reason}")
    packed, fill = held.packed, held.fill
    batch, heads = fill.batch, held.window.heads
    tiers = torch.zeros(batch * heads, layer.seen + 1, dtype=torch.uint8)  # the last column takes what is no token
    if held.config.selects:
        for tier in range(packed.tiers):
            filled, parts = packed.slots(tier, ("birth",))
            column = torch.where(filled, parts["birth"].long(), layer.seen).cpu()
            tiers.scatter_(1, column, (HIGH, LOW)[tier])
    else:
        first = fill.lengths - fill.counts + (0 if fill.pads is None else fill.pads)
        tiers[:] = (torch.arange(layer.seen + 1) < first.cpu()[:, None]).repeat_interleave(heads, 0) * HIGH
    position = torch.where(fill.valid, fill.token_positions, layer.seen).repeat_interleave(heads, 0).cpu()
    tiers.scatter_(1, position, WINDOW)
    return tiers[:, :-1].view(batch, heads, -1)


def _layer_report(cache: LeanKVCache, index: int, layer: Any) -> LayerReport:
    kind = type(layer).__name__
    held: LayerTokens | None = getattr(layer, "tokens", None)
    if held is None:
        return LayerReport(index, kind, False, cache.plain_reasons.get(index))
    packed, window, fill = held.packed, held.window, held.fill
    batch, heads = fill.batch, window.heads
    names = tuple(tier_name(tier) for tier in held.config.tiers)
    lengths = packed.table.lengths.view(batch, heads, 2).long().cpu()
    tokens, total = {}, Counter[str]()
    head_bytes = torch.zeros(batch, heads, dtype=torch.int64)
    for tier, name in enumerate(names):
        tokens[name] = lengths[..., tier]
        by_kind, by_row = _page_bytes(packed, tier)
        total.update(by_kind)
        head_bytes += by_row.view(batch, heads)
    tokens["window"] = fill.counts.cpu()[:, None].expand(batch, heads)
    real = fill.lengths.cpu()[:, None]
    tokens["pruned"] = real - sum(tokens.values())
    parts = {
        **total,
        "window": window.nbytes,
        "queries": held.queries.nbytes,
        "tables": held.table_bytes,
    }
    exact = int(real.sum()) * heads * (window.k.shape[3] + window.v.shape[3]) * window.k.element_size()
    return LayerReport(
        index, kind, True, None, names, held.rotations, tokens, parts, head_bytes, sum(parts.values()), exact
    )


def _page_bytes(packed: PackedLayer, tier: int) -> tuple[dict[str, int], Tensor]:
    """Bytes of the pages of a tier: by kind, and by row int64 [rows]."""
    layout, counts = packed.layouts[tier], packed.page_counts(tier)
    by_row, stored = (counts * layout.page_bytes).cpu(), int(packed.table.lengths[:, tier].sum())
    metadata = stored * (layout.page_bytes - layout.meta_start) // layout.tokens
    free, kinds = int(counts.sum()) * layout.tokens - stored, {}
    if isinstance(packed.pool, SealingPool) and layout.pack is not None:
        ids, row, _ = packed.table.pages(tier, counts)
        held, headers = packed.pool.sealed_bytes(packed.classes[tier], ids)
        by_row = torch.zeros_like(counts).index_add_(0, row, held).cpu()
        kinds = {"pack_headers": int(headers.sum())}
    free_bytes = free * layout.token_bytes
    codes = int(by_row.sum()) - metadata - free_bytes - sum(kinds.values())
    return {"codes": codes, "metadata": metadata, **kinds, "free_slots": free_bytes}, by_row


def tier_name(tier: Tier) -> str:
    """K8V4, `exact`, or Packed K0.1V2."""
    return f"K{tier[0]}V{tier[1]}" if isinstance(tier, tuple) else str(tier)


def _plain_bytes(layer: Any) -> int:
    held = 0
    if isinstance(layer, CacheLayerMixin):
        held = sum(x.nbytes for x in (layer.keys, layer.values) if isinstance(x, Tensor))
    for name in ("conv_states", "recurrent_states"):
        state = getattr(layer, name, None)
        held += sum(x.nbytes for x in (state.values() if isinstance(state, dict) else [state]) if isinstance(x, Tensor))
    return held


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def _grouped(layers: Any) -> dict[str, str]:
    groups: dict[str, list[int]] = {}
    for layer in layers:
        groups.setdefault(layer.reason, []).append(layer.index)
    return {reason: ", ".join(map(str, found)) for reason, found in groups.items()}


def _table(layers: list[LayerReport]) -> list[str]:
    """Mean tokens per head by tier, and the ratio, one line per layer."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.tokens))
    lines = ["  tokens per head  " + "".join(f"{name:>10}" for name in names) + "     ratio"]
    for layer in layers:
        means = "".join(
            f"{layer.tokens[name].float().mean():10.1f}" if name in layer.tokens else " " * 10 for name in names
        )
        lines.append(f"  layer {layer.index:<11}{means}{layer.physical_bytes / max(layer.exact_bytes, 1):10.3f}")
    return lines
