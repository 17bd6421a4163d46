"""Caches on disk: one safetensors file with codes, window and metadata, a checksum over all of it, and no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfkv.attend import Call
from hfkv.config import LeanKVConfig
from hfkv.fill import Fill
from hfkv.fingerprint import Fingerprint
from hfkv.handle import Chunk
from hfkv.layer import LeanKVLayer
from hfkv.natives import TensorReader, TensorWriter, native_from_state, native_state
from hfkv.paging.packed import PackedLayer
from hfkv.paging.table import PageTable, ragged_index
from hfkv.tokens import LayerTokens, plain_tensors
from hfkv.version import __version__

if TYPE_CHECKING:
    from hfkv.cache import LeanKVCache

    C = TypeVar("C", bound=LeanKVCache)

FORMAT, VERSION = "hfkv-cache", "1"
HEADER = {"format", "version", "written_by", "config", "model", "state", "checksum"}
UNSIGNED = "0" * 64
"""The checksum's place in the header while the checksum is worked out."""


def save(cache: LeanKVCache, path: str | os.PathLike[str]) -> None:
    """Write a cache to `path`; see `LeanKVCache.save`."""
    cache.forwards.check(cache)
    cache.check_packed()
    if cache.awaits_reconstruction:
        raise ValueError("this cache waits for hfkv.reconstruct(model, input_ids, cache): save it afterwards")
    writer = TensorWriter()
    fills: list[Fill] = []
    layers = [_layer_state(layer, index, writer, fills) for index, layer in enumerate(cache.layers)]
    state = {
        "page_tokens": cache._page_tokens,
        "layer_count": cache.layer_count,
        "encoder_decoder": cache.encoder_decoder,
        "recording": cache._recording,
        "flush_due": cache.flush_due,
        "plain_reasons": {str(index): reason for index, reason in cache.plain_reasons.items()},
        "fills": [_fill_state(fill, f"fill{number}", writer) for number, fill in enumerate(fills)],
        "layers": layers,
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"hfkv {__version__}, transformers {transformers.__version__}",
        "config": cache.config.to_json(),
        "model": cache.fingerprint.to_json(),
        "state": json.dumps(state, separators=(",", ":")),
        "checksum": UNSIGNED,
    }
    with _replacing(Path(path)) as partial:
        save_file(writer.tensors, partial, metadata)
        _sign(partial)


@plain_tensors()
def load(cls: type[C], path: str | os.PathLike[str], device: torch.device | str | None) -> C:
    """Read a cache from `path`; see `LeanKVCache.load`."""
    metadata = _verified(Path(path))
    config, state = LeanKVConfig.from_json(metadata["config"]), json.loads(metadata["state"])
    cache = cls(config)
    with safe_open(path, framework="pt") as file:
        reader = TensorReader(file.get_tensor, None if device is None else torch.device(device), str(path))
        fills = _each_once([_read_fill(fields, reader) for fields in state["fills"]])
        cache._page_tokens, cache.layer_count = state["page_tokens"], state["layer_count"]
        cache.layers = [_read_layer(cache, index, fields, reader) for index, fields in enumerate(state["layers"])]
        _fill_layers(cache, state["layers"], fills, reader)
    cache.encoder_decoder, cache._recording = state["encoder_decoder"], state["recording"]
    cache.flush_due = state["flush_due"]
    cache.plain_reasons = {int(index): reason for index, reason in state["plain_reasons"].items()}
    cache.fingerprint = Fingerprint.from_json(metadata["model"])
    return cache


# ---- layers ------------------------------------------------------------------------------------------------------


def _layer_state(layer: Any, index: int, writer: TensorWriter, fills: list[Fill]) -> dict[str, Any]:
    """What JSON says of a layer; its tensors go to `writer`."""
    if not isinstance(layer, LeanKVLayer):
        return native_state(layer, index, writer)
    tokens = layer.tokens
    if tokens is None:
        return {"kind": "empty"}
    window, packed, fill = tokens.window, tokens.packed, tokens.fill
    writer.add(f"{index}.k", window.k[:, :, : fill.most])
    writer.add(f"{index}.v", window.v[:, :, : fill.most])
    writer.add(f"{index}.lengths", packed.table.lengths)
    for tier, cls in enumerate(packed.classes):
        ids = packed.table.pages(tier, packed.page_counts(tier))[0]
        if packed.pool.owners is not None:  # a page that rows share is written once
            ids, page = ids.unique(return_inverse=True)
            if page.numel() > ids.numel():
                writer.add(f"{index}.page_of{tier}", page.int())
        for name, part in packed.pool.dump(cls, ids).items():
            writer.add(f"{index}.{name}{tier}", part)
    if packed.basis.mean is not None:
        writer.add(f"{index}.mean", packed.basis.mean)
        writer.add(f"{index}.has_mean", packed.has_mean)
    queries, call = tokens.queries.kept(), tokens.call
    if queries is not None:
        writer.add(f"{index}.queries", queries)
    if call is not None and call.sinks is not None:
        writer.add(f"{index}.sinks", call.sinks)
    if not any(fill is known for known in fills):
        fills.append(fill)
    return {
        "kind": "lean",
        "device": str(tokens.device),
        "seen": layer.seen,
        "fill": next(number for number, known in enumerate(fills) if known is fill),
        "page_bytes": [list(layout.fields.values()) for layout in packed.layouts],
        "positions": tokens.queries.positions,
        "stands_for": tokens.queries.stands_for,
        "query": None if tokens.queries.q is None else list(tokens.queries.q.shape),
        "call": None if call is None else [float(call.scaling), call.softcap],
    }


def _read_layer(cache: LeanKVCache, index: int, fields: dict[str, Any], reader: TensorReader) -> Any:
    """A layer without its packed pages."""
    if fields["kind"] not in ("lean", "empty"):
        return native_from_state(fields, reader)
    layer = cache._make_layer(index)
    if fields["kind"] == "empty":
        return layer
    k, v = (reader.get(f"{index}.{side}", fields["device"]) for side in "kv")
    layer.lazy_initialization(k, v)
    tokens = layer.tokens = LayerTokens(cache, layer.config, Chunk(layer, k[:, :, :0], v[:, :, :0]))
    layer.seen = fields["seen"]
    if [[list(r) for r in layout.fields.values()] for layout in tokens.packed.layouts] != fields["page_bytes"]:
        raise ValueError(f"{reader.path}: its pages have another layout; it was written by another version of hfkv")
    tokens.window.k[:, :, : k.shape[2]], tokens.window.v[:, :, : v.shape[2]] = k, v
    tokens.queries.positions, tokens.queries.stands_for = list(fields["positions"]), fields["stands_for"]
    if fields["query"] is not None:
        tokens.queries.q = k.new_zeros(fields["query"])
        if tokens.queries.positions:
            kept = reader.get(f"{index}.queries", fields["device"])
            tokens.queries.q[:, :, : kept.shape[2]] = kept
    if fields["call"] is not None:
        scaling, softcap = fields["call"]
        tokens.call = Call(scaling, softcap, reader.find(f"{index}.sinks", fields["device"]))
    tokens.packed.basis.mean = reader.find(f"{index}.mean", fields["device"])
    if tokens.packed.basis.mean is not None:
        tokens.packed.has_mean = reader.get(f"{index}.has_mean", fields["device"])
    return layer


def _fill_layers(cache: LeanKVCache, states: list[dict[str, Any]], fills: list[Fill], reader: TensorReader) -> None:
    """Put the saved pages in, after making room for those of all layers at once."""
    held: list[tuple[int, LayerTokens, PageTable, list[Tensor]]] = []
    shared: dict[tuple[int, int], Tensor] = {}  # (layer, tier): which page each entry of a table names
    work: list[tuple[PackedLayer, list[list[int]]]] = []
    for index, fields in enumerate(states):
        if fields["kind"] == "lean":
            tokens = cache.layers[index].tokens
            tokens.fill = fills[fields["fill"]]
            table = _empty_table(tokens.packed, reader.get(f"{index}.lengths", fields["device"]))
            counts = [table.page_counts(tier, layout.tokens) for tier, layout in enumerate(tokens.packed.layouts)]
            growth = [[int(n.sum()), 0] for n in counts]
            for tier in range(len(counts)):
                page = reader.find(f"{index}.page_of{tier}", fields["device"])
                if page is not None:
                    shared[index, tier], growth[tier] = page.long(), [int(page.max()) + 1, 0]
            held.append((index, tokens, table, counts))
            work.append((tokens.packed, growth))
    for pool in cache.pools:
        cache._reserve_growth(pool, [(packed, growth) for packed, growth in work if packed.pool is pool], 0.0)
    for (index, tokens, table, counts), (packed, growth) in zip(held, work, strict=True):
        for tier, cls in enumerate(packed.classes):
            ids = packed.pool.allocate(cls, torch.tensor(growth[tier][:1]))
            packed.pool.undump(cls, ids, partial(_part, reader, index, tier, tokens.device))
            if (index, tier) in shared:
                named = ids[shared[index, tier]]
                packed.pool.share(named)
                packed.pool.release(cls, ids)  # every mention is an owner, having been allocated is none
                ids = named
            table.write(tier, *ragged_index(counts[tier]), ids)
        packed.table, packed.widest = table, [int(n.max()) for n in (*counts, torch.stack(counts).sum(0))]
        packed.changed()


def _part(reader: TensorReader, index: int, tier: int, device: torch.device, name: str) -> Tensor:
    """A part of a tier's pages, as `PagePool.dump` named it."""
    return reader.get(f"{index}.{name}{tier}", device)


def _empty_table(packed: PackedLayer, lengths: Tensor) -> PageTable:
    """A table as wide as its longest row, its pages yet to be entered."""
    table = PageTable(lengths.shape[0], packed.pool.device)
    table.lengths = lengths
    counts = sum(table.page_counts(tier, layout.tokens) for tier, layout in enumerate(packed.layouts))
    assert isinstance(counts, Tensor)
    table.ids = torch.zeros(counts.numel(), int(counts.max()), dtype=torch.int32, device=packed.pool.device)
    return table


def _fill_state(fill: Fill, name: str, writer: TensorWriter) -> dict[str, Any]:
    writer.add(f"{name}.counts", fill.counts.int())
    if fill.positions is not None:
        writer.add(f"{name}.positions", fill.positions.int())
    if fill.pads is not None:
        writer.add(f"{name}.pads", fill.pads.int())
    fields = {"name": name, "device": str(fill.counts.device)}
    return fields | {"uniform": fill.uniform, "most": fill.most, "seen": fill.seen}


def _read_fill(fields: dict[str, Any], reader: TensorReader) -> Fill:
    name, device = fields["name"], fields["device"]
    positions, pads = (reader.find(f"{name}.{part}", device) for part in ("positions", "pads"))
    return Fill(
        fields["uniform"],
        reader.get(f"{name}.counts", device).long(),
        fields["most"],
        None if positions is None else positions.long(),
        fields["seen"],
        None if pads is None else pads.long(),
    )


def _each_once(fills: list[Fill]) -> list[Fill]:
    """Fills of several devices that have come to one are one: their layers go on together."""
    known: list[Fill] = []
    for fill in fills:
        known.append(next((other for other in known if other.equals(fill)), fill))
    return known


# ---- files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when all went well, and is removed when not."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sign(path: Path) -> None:
    """Put the checksum of the whole file into its header."""
    with open(path, "r+b") as file:
        header = _header(file.read(8), path, file)
        start = 8 + header.index(_entry(UNSIGNED)) + len(_entry("")) - 1
        digest = _digest(file, header)
        file.seek(start)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _verified(path: Path) -> dict[str, str]:
    """The metadata of a cache file that is whole and unaltered.

    Raises:
        ValueError: it is not.
    """
    with open(path, "rb") as file:
        header = _header(file.read(8), path, file)
        try:
            metadata = json.loads(header)["__metadata__"]
            known = metadata["format"] == FORMAT and metadata.keys() >= HEADER
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise ValueError(f"{path} is not a file of LeanKVCache.save, or its header is damaged")
        if metadata["version"] != VERSION:
            raise ValueError(
                f"{path} has the format {metadata['version']}, this version of hfkv reads {VERSION}: it was written by "
                f"{metadata['written_by']}"
            )
        if _digest(file, header.replace(_entry(metadata["checksum"]), _entry(UNSIGNED))) != metadata["checksum"]:
            raise ValueError(f"{path} is truncated or was altered: its checksum does not match; make the cache anew")
    return metadata


def _entry(checksum: str) -> bytes:
    return f'"checksum":"{checksum}"'.encode()


def _header(prefix: bytes, path: Path, file: Any) -> bytes:
    size = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or size > os.fstat(file.fileno()).st_size - 8:
        raise ValueError(f"{path} is truncated or not a file of LeanKVCache.save")
    return file.read(size)


def _digest(file: Any, header: bytes) -> str:
    """SHA-256 of length and header, with the checksum's place blank, and of the rest of the file."""
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()
