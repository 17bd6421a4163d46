"""`LeanKVCache`: HuggingFace's face of the compressed cache, and what its layers share."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfkv import storage
from hfkv.config import LeanKVConfig
from hfkv.fill import FillBook
from hfkv.fingerprint import Fingerprint
from hfkv.forward import ForwardBook
from hfkv.hidden import drop_hidden
from hfkv.hybrid import LazyLinearLayers
from hfkv.kernels.quantize_pack import check_flags
from hfkv.layer import LeanKVLayer
from hfkv.natives import check_native
from hfkv.paging.bounds import noting
from hfkv.paging.compaction import Compaction
from hfkv.paging.mail import Mail
from hfkv.paging.pool import OutOfPages, PagePool
from hfkv.paging.rows import PackedRows
from hfkv.paging.sealed import SealingPool
from hfkv.paging.sharing import close_up, share_pages
from hfkv.report import Report, TokenMap, make_report, token_map
from hfkv.rope import Rotary, rotary_of
from hfkv.tiering import Flush, alike, apply_flush, code_flush, count_flush, plan_flush
from hfkv.tokens import LayerTokens, plain_tensors

logger = logging.getLogger("hfkv")

FLUSH_SLACK = 1 / 32
"""A pool that grows at a flush grows by at least this share, so that a long generation does not end in many arenas."""

PAGE_WASTE = 0.01


class LeanKVCache(LazyLinearLayers):
    """A KV cache that keeps tokens packed, in pages, in tiers by significance; a drop-in for `past_key_values`.

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="leankv")
        model.generate(**inputs, past_key_values=LeanKVCache())

    Args:
        config: a `LeanKVConfig`; None is the preset `balanced`.
        model_config: the model's config, if at hand: its layers' kinds are then known before the first forward.

    Raises:
        TypeError: `config` is not a LeanKVConfig (a model's config belongs to `model_config`).
    """

    def __init__(self, config: LeanKVConfig | None = None, model_config: PretrainedConfig | None = None) -> None:
        if config is not None and not isinstance(config, LeanKVConfig):
            hint = ": give the model's config as model_config=" if isinstance(config, PretrainedConfig) else ""
            raise TypeError(f"LeanKVCache needs a LeanKVConfig, not {type(config).__name__}{hint}")
        if model_config is not None and not isinstance(model_config, PretrainedConfig):
            raise TypeError(
                f"LeanKVCache(model_config=...) needs the model's PretrainedConfig, not {type(model_config).__name__}"
            )
        super().__init__()
        self.config = config if config is not None else LeanKVConfig()
        self.model_config = model_config
        self.layer_count = (
            None if model_config is None else model_config.get_text_config(decoder=True).num_hidden_layers
        )
        self._pools: dict[torch.device, PagePool] = {}
        self.native_layers: tuple[Any, list[Any]] | None = None
        self._recording = False
        self.compiled = False
        self._start()

    def __deepcopy__(self, memo: dict) -> LeanKVCache:
        """An independent cache with pages of its own."""
        other = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(other, name, copy.deepcopy(value, memo))
        for layer in other.layers:
            if isinstance(layer, LeanKVLayer):
                layer.bind(other)
        return other

    def _start(self) -> None:
        """Begin empty: no layers, no pages, nothing remembered."""
        self.layers: list[Any] = []
        self.plain_reasons: dict[int, str] = {}
        self._pools.clear()
        self.workspaces: dict[torch.device, Any] = {}
        self._page_tokens: int | None = None
        self.encoder_decoder = False
        self.forwards = ForwardBook()
        self.fingerprint = Fingerprint()
        self.flush_due = False
        self._budget_said = False
        self.observing = False
        self._rotaries: dict[tuple, Rotary | None] = {}
        self.fills = FillBook()
        self.decode_step: Any = None  # the one that `hfkv.compile_decode` has recorded of this cache
        if self.model_config is not None:
            for index, native in enumerate(DynamicCache(config=self.model_config).layers):
                if type(native) is DynamicLayer:
                    self.layers.append(self._make_layer(index))
                else:
                    self.layers.append(native)
                    self._note_plain(index, f"{type(native).__name__} of transformers fits it better")

    # ---- update ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [batch, kv_heads, q, dim] of a layer; returns handles for the attention function.

        Raises:
            OutOfPages: `max_bytes` does not hold the step; nothing has changed.
            ValueError: another batch size, model, dtype or device.
            RuntimeError: an earlier forward stopped halfway.
        """
        layer = self.layer_at(layer_idx)
        begins = self.forwards.begins(self, layer_idx)
        try:
            if isinstance(layer, LeanKVLayer):
                layer.check(key_states, value_states)
            else:
                check_native(layer, layer_idx, key_states, value_states)
        except ValueError:
            self.undo_forward()  # layers before it may have stored theirs
            raise
        if isinstance(layer, LeanKVLayer):
            if begins:
                self._make_ready(key_states.shape[2])
            state: Any = layer.snapshot(key_states.shape[2])
        else:
            state = copy.copy(layer)
        self.forwards.note(self, layer_idx, layer, state)
        return layer.update(key_states, value_states, *args, **kwargs)

    def layer_at(self, index: int) -> Any:
        """The layer for keys and values at an index, made if it is new."""
        self.join_linear_layer(index)
        while len(self.layers) <= index:
            self.layers.append(self._make_layer(len(self.layers)))
        return self.layers[index]

    def _make_layer(self, index: int) -> LeanKVLayer:
        return LeanKVLayer(self, index, self.config.for_layer(index))

    @property
    def lean_layers(self) -> list[LeanKVLayer]:
        """The layers that compress, or will as soon as they get their first chunk."""
        return [layer for layer in self.layers if isinstance(layer, LeanKVLayer) and layer.is_initialized]

    @property
    def compressed(self) -> list[LayerTokens]:
        """What the compressing layers hold, in their order."""
        return [layer.tokens for layer in self.lean_layers if layer.tokens is not None]

    def compile_loops(self) -> None:
        """Have layers on the CPU read codes by compiled loops from now on; see `hfkv.compile_decode`."""
        self.compiled = True
        for tokens in self.compressed:
            tokens.choose_kernels()

    def _must_flush(self, new: int) -> bool:
        """Whether `new` tokens need the windows emptied first: a step would overflow one, or a prompt left work."""
        held = self.compressed
        if not held:
            return False
        return self.flush_due or held[0].capacity_left < new <= self.config.flush

    def begin_step(self) -> None:
        """What the first update of a forward of one token does before anything changes, for a step without updates.

        Raises:
            OutOfPages: `max_bytes` does not hold the step; nothing has changed.
            RuntimeError: an earlier forward stopped halfway.
        """
        self.forwards.begin(self)
        self._make_ready(1)

    def _make_ready(self, new: int) -> None:
        """Before a forward of `new` tokens changes anything: flush where a window has no room for them."""
        if self.observing:
            return
        if self.awaits_reconstruction:
            raise ValueError(
                "LeanKVConfig(score='kvzip') needs a second pass over the prompt before anything follows it: fill the "
                "cache by hfkv.reconstruct(model, input_ids, cache), or use score='replay', which needs none"
            )
        if self._must_flush(new):
            self.flush()

    def undo_forward(self) -> None:
        """Put every layer back to where it was before the forward that is failing."""
        self.forwards.undo(self)

    # ---- a second pass over the prompt -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reconstructing(self) -> Iterator[None]:
        """Forwards inside look at what is held and store nothing; see `hfkv.reconstruct`."""
        self.observing = True
        try:
            yield
        finally:
            self.observing = False

    @property
    def awaits_reconstruction(self) -> bool:
        """Whether a prompt was stored whole, for `hfkv.reconstruct` to prune."""
        return any(tokens.whole for tokens in self.compressed)

    @plain_tensors()
    def close_up(self) -> None:
        """Give back the memory of pages that a large release has left free, by moving the others together."""
        with self.forwards.changing("closing up"):
            for device, pool in self._pools.items():
                close_up(pool, [tokens.packed for tokens in self.compressed if tokens.device == device])

    # ---- flush -----------------------------------------------------------------------------------------------------

    @plain_tensors()
    def flush(self) -> None:
        """Observe, choose tiers, compact: every layer packs what it has beyond its window, all or none of them.

        Where kernels work and, by what the host knows, pages and tables have room, nobody waits for the device.

        Raises:
            OutOfPages: the pages cannot be had; nothing has changed.
            ValueError: keys or values that cannot be coded, found before anything has changed; or, where nobody has
                waited for the device, what the flush before this one has packed: then the cache must be reset.
        """
        self.check_packed()
        planned, awaited = plan_flush(self.compressed), []
        slack = FLUSH_SLACK if self.config.budget is None else 0.0
        for pool in self.pools:
            own = [flush for flush in planned if flush.packed.pool is pool]
            if own and self._has_room(pool, own):
                awaited.append((pool, own))
            elif own:
                count_flush(pool, own)
        try:
            coded = [code_flush(flush) for flush in planned]
            for pool in self.pools:
                own = [flush for flush in planned if flush.packed.pool is pool and flush.plan.counted]
                self.reserve(pool, [(flush.packed, flush.plan) for flush in own], slack)
        except OutOfPages:
            for grown in self.pools[: self.pools.index(pool)]:
                grown.trim()
            raise
        finally:
            for pool in self.pools:
                pool.note_used(None)
        with self.forwards.changing("flush"):
            for layer in self.lean_layers:
                layer.generation += 1
            for flush, tokens in zip(planned, coded, strict=True):
                apply_flush(flush, tokens)
            for pool, own in awaited:
                works = [(flush.packed, flush.plan) for flush in own]
                pool.expect(Mail(torch.cat([plan.numbers for _, plan in works])), noting(works))
        self.flush_due = False

    def check_packed(self) -> None:
        """Raise ValueError where a flush that nobody has waited for has packed what cannot be coded."""
        for pool in self.pools:
            pool.catch_up()
            check_flags(pool.uncodable, late=True)

    def _has_room(self, pool: PagePool, flushes: list[Flush]) -> bool:
        """Whether a pool surely has the pages that flushes need; they are made ready then."""
        peak: dict[int, int] = {}
        for flush in flushes:
            most = flush.most
            if most is None:
                return False
            for cls, (needed, _) in zip(flush.packed.classes, most, strict=True):
                peak[cls] = peak.get(cls, 0) + needed
        if not pool.has_room(peak):
            return False
        pool.reserve(peak)
        return True

    def request_flush(self) -> None:
        """Flush before the next forward: a continued prompt has been appended without revising the past."""
        self.flush_due = True

    def reserve(self, pool: PagePool, work: list[tuple[PackedRows, Compaction]], slack: float = 0.0) -> None:
        """Make room for compactions that will be applied in this order, the pages that one frees serving the next."""
        steps = []
        for packed, plan in work:
            if plan.copies:
                steps.append((packed, [[count, 0] for count in plan.copies]))
            steps.append((packed, plan.growth))
        self._reserve_growth(pool, steps, slack)

    def _reserve_growth(self, pool: PagePool, work: Sequence[tuple[PackedRows, list[list[int]]]], slack: float) -> None:
        running: dict[int, int] = {}
        peak: dict[int, int] = {}
        for packed, growth in work:
            for cls, (needed, freed) in zip(packed.classes, growth, strict=True):
                running[cls] = running.get(cls, 0) + needed - freed
                peak[cls] = max(peak.get(cls, 0), running[cls])
        if self.config.max_bytes is not None:
            pool.max_bytes = max(0, self.config.max_bytes - self._unpaged_bytes(pool.device))
        pool.reserve(peak, slack)

    @plain_tensors()
    def drop_hidden(self, mask: Tensor, new: int, valid: Tensor | None) -> bool:
        """Drop packed tokens that a padding mask hides by now; see `hfkv.hidden`."""
        return drop_hidden(self, mask, new, valid)

    # ---- shared by the layers of a step ------------------------------------------------------------------------------

    def pool(self, device: torch.device) -> PagePool:
        """The page pool of a device."""
        if device not in self._pools:
            self._pools[device] = SealingPool(device) if self.config.packs else PagePool(device)
        return self._pools[device]

    @property
    def pools(self) -> list[PagePool]:
        return list(self._pools.values())

    def layers_on(self, device: torch.device) -> int:
        """Layers that share the pool of a device: all, but those that are known to be elsewhere."""
        elsewhere = sum(tokens.device != device for tokens in self.compressed)
        return max((self.layer_count or 1) - elsewhere, 1)

    def page_tokens(self, tokens: int, tiers: int) -> int:
        """Tokens per page: 64, or 32 where half-filled pages of 64 would waste over 1 % of a head's `tokens`."""
        if self._page_tokens is None:
            small = 32 * tiers > PAGE_WASTE * tokens and not self.config.packs
            self._page_tokens = self.config.page_tokens or (32 if small else 64)
        return self._page_tokens

    def keep_plain(self, layer: LeanKVLayer, native: Any, reason: str) -> tuple[Tensor, Tensor]:
        """Swap one of transformers' own layers in for one that cannot be compressed -> its plain keys and values."""
        chunk = layer.pending
        assert chunk is not None and layer.tokens is None
        if self._recording and hasattr(native, "activate_past_recording"):
            native.activate_past_recording()
        self.layers[layer.index] = native
        self._note_plain(layer.index, reason)
        chunk.stored, layer.pending = True, None
        k, v = native.update(chunk.k, chunk.v)
        return k, v

    def _note_plain(self, index: int, reason: str) -> None:
        if reason not in self.plain_reasons.values():
            logger.warning("layer %d (and others alike) is not compressed: %s", index, reason)
        self.plain_reasons[index] = reason

    def rotary(self, module: nn.Module, q: Tensor) -> Rotary | None:
        """The rotary embedding of the model that an attention module belongs to, for queries like `q`."""
        key = (type(module), q.shape[-1], q.device)
        if key not in self._rotaries:
            self._rotaries[key] = rotary_of(module, q.shape[-1], q.device)
        return self._rotaries[key]

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def note_fixed_cost(self, ratio: float) -> None:
        """Say once that a budget is below what window, queries and tables take alone: `ratio` of the exact bytes."""
        if not self._budget_said:
            self._budget_said = True
            logger.warning(
                "budget=%g cannot be kept yet: recent window, queries and tables alone take %.3f of the exact bytes; "
                "use a smaller LeanKVConfig.window or a longer context",
                self.config.budget,
                ratio,
            )

    def _unpaged_bytes(self, device: torch.device) -> int:
        return sum(tokens.unpaged_bytes for tokens in self.compressed if tokens.device == device)

    def report(self) -> Report:
        """Physical bytes, ratio, tiers and bytes per layer and head; printed, it is a table."""
        return make_report(self)

    def token_map(self, layer_idx: int) -> TokenMap:
        """Tier and significance of every token that a layer has seen, by position; see `hfkv.report.TokenMap`."""
        return token_map(self, layer_idx)

    # ---- transformers' calls ---------------------------------------------------------------------------------------

    def __iter__(self) -> Any:
        raise TypeError(
            "a LeanKVCache cannot be read as (keys, values) pairs, since its tokens are packed: use cache.report()"
        )

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Logical tokens after a forward of `query_length` more, and the position of the first of them."""
        return super().get_mask_sizes(query_length, layer_idx)

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen, whatever is kept of them."""
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], LeanKVLayer):
            return self.layers[layer_idx].get_seq_length()
        return super().get_seq_length(layer_idx)

    def activate_past_recording(self) -> None:
        self._recording = True
        super().activate_past_recording()

    def reset(self) -> None:
        """Forget everything and give the memory back; the cache is then as new."""
        self._start()

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, whole or not at all.

        Raises:
            ValueError: a policy of one's own or a layer of an unknown class, which cannot be written.
            RuntimeError: a forward stopped halfway.
        """
        storage.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> LeanKVCache:
        """Read what `save` wrote, to `device` or to where it was; the model that filled it goes on from there.

        Raises:
            ValueError: the file is truncated, altered, no cache, of another version, or its device is not here.
            OutOfPages: the config's `max_bytes` does not hold it.
        """
        return storage.load(cls, path, device)

    # ---- more of transformers' calls ---------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the newest tokens: `-n` (or 0) removes n, a positive number is the length to keep.

        Raises:
            ValueError: the crop reaches packed tokens; nothing has changed.
        """
        amount = int(tokens_to_remove)
        seen = self.get_seq_length()
        remove = -amount if amount <= 0 else max(0, seen - amount)
        lean = self.lean_layers
        for layer in lean:
            layer.check_crop(remove)
        before = [layer if isinstance(layer, LeanKVLayer) else copy.copy(layer) for layer in self.layers]
        try:
            for layer in self.layers:
                if not isinstance(layer, LeanKVLayer) and hasattr(layer, "crop"):
                    layer.crop(-remove)  # 0 too: layers that record their past drop the record
        except BaseException:
            self.layers = before
            raise
        with self.forwards.changing("crop"):
            for layer in lean:
                layer.crop(-remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i a copy of today's sequence `beam_idx[i]`."""
        self._select(beam_idx, lambda layer, own: layer.reorder_cache(own))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._select(indices, lambda layer, own: layer.batch_select_indices(own))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        held = self.compressed
        index = torch.arange(held[0].fill.batch if held else 0).repeat_interleave(repeats)
        self._select(index, lambda layer, _: layer.batch_repeat_interleave(repeats))

    @plain_tensors()
    def _select(self, index: Tensor, plain: Callable[[Any, Tensor], None]) -> None:
        """Make sequence i a copy of `index[i]` everywhere.

        Args:
            plain: does it for one of transformers' own layers, given it and the index on its device.
        """
        held = self.compressed
        batch = held[0].fill.batch if held else 0
        if held and torch.equal(index.cpu(), torch.arange(batch)):
            return
        self._check_room(held, index.numel())
        own = {device: index.to(device) for device in self._pools}
        with self.forwards.changing("reorder"):
            for group in alike(held):
                share_pages([tokens.packed for tokens in group], group[0].rows_of(own[group[0].device]))
            for layer in self.layers:
                if not isinstance(layer, LeanKVLayer):
                    place = getattr(layer, "device", None)
                    plain(layer, index if place is None else index.to(place))
                elif layer.tokens is not None:
                    layer.select(own[layer.tokens.device])
            if held and index.numel() < batch:
                for pool in self.pools:
                    pool.trim()

    def _check_room(self, held: Sequence[LayerTokens], batch: int) -> None:
        """Raise OutOfPages where `max_bytes` does not hold the exact parts of so many sequences; pages are shared."""
        if self.config.max_bytes is None or not held or batch < held[0].fill.batch:
            return
        for device, pool in self._pools.items():
            wanted = self._unpaged_bytes(device) * batch // held[0].fill.batch + pool.owners_bytes
            if pool.physical_bytes + wanted > self.config.max_bytes:
                raise OutOfPages(
                    f"{batch} sequences take {wanted:,} bytes of recent windows and tables beside "
                    f"{pool.physical_bytes:,} of pages, but max_bytes is {self.config.max_bytes:,}: nothing was "
                    "changed; raise LeanKVConfig.max_bytes, or use a smaller LeanKVConfig.window"
                )
