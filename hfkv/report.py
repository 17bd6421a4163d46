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
from hfkv.paging.sharing import pages_once

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
        head_bytes: int64 [batch, kv_heads], pages of the head; one that sequences share counts at the first of them.
        physical_bytes, exact_bytes: sums for this layer; exact_bytes is 0 where it is not compressed.
        shared_bytes: what pages that sequences share would take beside that, had each sequence its own.
        device: where a compressed layer lies, as cuda:1.
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
    shared_bytes: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Report:
    """Bytes of a cache: `physical_bytes` is all that is held for its compressed layers, capacity and not fill.

    Attributes:
        physical_bytes: codes, metadata, free slots and pages, windows, queries, tables.
        exact_bytes: what the same tokens take in the model's dtype.
        plain_bytes: bytes of the layers that transformers keeps, not part of the two above.
        pool_free_bytes: free pages, unused chunks and chunk remainders.
        pack_slack_bytes: what pages of packs hold beside live packs.
        workspace_bytes: buffers of a step, which all layers of a device share, and those of a recorded step.
        tokens: logical tokens per sequence.
        layers: one `LayerReport` each.
        backend: what runs the kernels, `triton`, `torch` or `inductor`; `none` before the first prompt.
        shared_bytes: what pages that sequences share would take beside `physical_bytes`, had each sequence its own.
        device_bytes: `physical_bytes` by device; each has a page pool of its own, and `max_bytes` limits each.
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
    shared_bytes: int
    device_bytes: dict[str, int]

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
        if len(self.device_bytes) > 1:
            for device, size in self.device_bytes.items():
                own = ", ".join(str(layer.index) for layer in compressed if layer.device == device)
                lines.append(f"  on {device}: {_size(size)}, layers {own}")
        if self.shared_bytes:
            lines.append(f"  pages that sequences share spare {_size(self.shared_bytes)}")
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
    space += 0 if cache.decode_step is None else cache.decode_step.nbytes
    physical, exact = sum(layer.physical_bytes for layer in layers) + free + space, sum(x.exact_bytes for x in layers)
    backend = ", ".join(sorted({tokens.kernels.name for tokens in cache.compressed})) or "none"
    shared = sum(layer.shared_bytes for layer in layers)
    slack = sum(pool.slack_bytes for pool in pools if isinstance(pool, SealingPool))
    seen = cache.get_seq_length()
    return Report(
        physical, exact, plain, free - slack, slack, space, seen, layers, backend, shared, _by_device(cache, layers)
    )


def _by_device(cache: LeanKVCache, layers: list[LayerReport]) -> dict[str, int]:
    held: Counter[str] = Counter()
    for pool in cache.pools:
        held[str(pool.device)] += pool.physical_bytes - pool.used_bytes
    for device, workspace in cache.workspaces.items():
        held[str(device)] += workspace.nbytes
    for layer in layers:
        if layer.device is not None:
            held[layer.device] += layer.physical_bytes
    if cache.decode_step is not None:
        held[str(cache.pools[0].device)] += cache.decode_step.nbytes
    return dict(held)


@dataclass(frozen=True)
class TokenMap:
    """Every token that one layer has seen, by logical position.

    For every KV head a token is in exactly one place: a tier, the window, or no longer stored.

    Attributes:
        tier: uint8 [batch, kv_heads, tokens] of PRUNED, LOW, HIGH, WINDOW. Pads were never stored and read as PRUNED.
            A config that does not select stores no positions: what is packed is read as HIGH, just before the window.
        score: float32 of that shape: the significance stored with the token, N times the mean attention probability
            (1 = uniform); NaN where none is stored: pruned, in the window, or a config that does not select.
    """

    tier: Tensor
    score: Tensor


def token_map(cache: LeanKVCache, layer_idx: int) -> TokenMap:
    """Where every token of a layer is, and the significance it has there; reads the cache only, tensors on the CPU.

    Raises:
        ValueError: the layer is not compressed, or there is no such layer.
    """
    if not 0 <= layer_idx < len(cache.layers):
        raise ValueError(f"layer {layer_idx} is not there: this cache has {len(cache.layers)} layers, from 0")
    layer = cache.layers[layer_idx]
    held: LayerTokens | None = getattr(layer, "tokens", None)
    if held is None:
        reason = cache.plain_reasons.get(layer_idx, "it has no tokens yet")
        raise ValueError(f"layer {layer_idx} is not compressed: {reason}")
    packed, fill = held.packed, held.fill
    batch, heads = fill.batch, held.window.heads
    tiers = torch.zeros(batch * heads, layer.seen + 1, dtype=torch.uint8)  # the last column takes what is no token
    scores = torch.full(tiers.shape, float("nan"))
    if held.config.selects:
        for tier in range(packed.tiers):
            filled, parts = packed.slots(tier, ("score", "birth"))
            column = torch.where(filled, parts["birth"].long(), layer.seen).cpu()
            tiers.scatter_(1, column, (HIGH, LOW)[tier])
            scores.scatter_(1, column, parts["score"].float().cpu())
    else:
        end = torch.nn.functional.pad(fill.token_positions, (0, 1), value=fill.seen)[:, :1].cpu()  # [batch, 1]
        first, place = end - (fill.lengths - fill.counts)[:, None].cpu(), torch.arange(layer.seen + 1)
        tiers[:] = ((place >= first) & (place < end)).repeat_interleave(heads, 0) * HIGH
    position = torch.where(fill.valid, fill.token_positions, layer.seen).repeat_interleave(heads, 0).cpu()
    tiers.scatter_(1, position, WINDOW)
    return TokenMap(tiers[:, :-1].view(batch, heads, -1), scores[:, :-1].view(batch, heads, -1))


def tier_map(cache: LeanKVCache, layer_idx: int) -> Tensor:
    """`token_map(...).tier`: uint8 [batch, kv_heads, tokens] of PRUNED, LOW, HIGH, WINDOW."""
    return token_map(cache, layer_idx).tier


def _layer_report(cache: LeanKVCache, index: int, layer: Any) -> LayerReport:
    kind = type(layer).__name__
    held: LayerTokens | None = getattr(layer, "tokens", None)
    if held is None:
        return LayerReport(index, kind, False, cache.plain_reasons.get(index))
    packed, window, fill = held.packed, held.window, held.fill
    batch, heads = fill.batch, window.heads
    names = tuple(tier_name(tier) for tier in held.config.tiers)
    lengths = packed.table.lengths.view(batch, heads, 2).long().cpu()
    tokens, total, shared = {}, Counter[str](), 0
    head_bytes = torch.zeros(batch, heads, dtype=torch.int64)
    for tier, name in enumerate(names):
        tokens[name] = lengths[..., tier]
        by_kind, by_row, spared = _page_bytes(packed, tier)
        total.update(by_kind)
        head_bytes += by_row.view(batch, heads)
        shared += spared
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
    physical, rotations, device = sum(parts.values()), held.rotations, str(held.device)
    return LayerReport(
        index, kind, True, None, names, rotations, tokens, parts, head_bytes, physical, exact, shared, device
    )


def _page_bytes(packed: PackedLayer, tier: int) -> tuple[dict[str, int], Tensor, int]:
    """Bytes of the pages of a tier, shared ones once: by kind, by row int64 [rows], and what sharing them spares."""
    layout, counts = packed.layouts[tier], packed.page_counts(tier)
    ids, row, filled = pages_once(packed, tier)
    held, kinds = torch.full_like(row, layout.page_bytes), {}
    if isinstance(packed.pool, SealingPool) and layout.pack is not None:
        held, headers = packed.pool.sealed_bytes(packed.classes[tier], ids)
        kinds = {"pack_headers": int(headers.sum())}
    by_row, stored = torch.zeros_like(counts).index_add_(0, row, held).cpu(), int(filled.sum())
    metadata = stored * (layout.page_bytes - layout.meta_start) // layout.tokens
    free = (row.numel() * layout.tokens - stored) * layout.token_bytes
    codes = int(by_row.sum()) - metadata - free - sum(kinds.values())
    spared = (int(counts.sum()) - row.numel()) * int(by_row.sum()) // max(row.numel(), 1)
    return {"codes": codes, "metadata": metadata, **kinds, "free_slots": free}, by_row, spared


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
