"""The decode step's work, laid out at a flush and used until the next: who reads which pages, and where results go.

All rows' pages and windows lie one behind the other, row by row, tier by tier; their bytes are cut into equal shares.
A work item is a piece between two cuts or borders of rows and tiers, so there are always
rows * (tiers + 1) + shares - 1 of them (some empty), which the host knows without asking the device: one program each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfkv.kernels.shared_memory import page_room
from hfkv.kernels.triton.constants import power_of_two
from hfkv.paging.mail import sent
from hfkv.quant import PageLayout

WINDOW_STEP = 16
COLUMNS = 8
"""Queries of one KV head that a program takes at once: with high and low parts, 16 rows of a matrix product."""

WARPS = 2
"""Pages that a program reads at once, where shared memory holds them."""

PROGRAMS_PER_SM = {80: 6, 86: 3, 89: 3, 90: 6, 100: 5, 120: 3}
"""Programs that fit a multiprocessor: 12 warps of 168 registers, less where shared memory is scarce."""

MAX_REGISTERS = {86: 224, 89: 224, 90: None, 100: 176, 120: 224}
"""Registers that a thread may have where the compiler's own choice (None) spills; few programs fit anyway."""

CPU_PROGRAMS = 6


@dataclass
class Workspace:
    """Buffers of one step on one device, shared by layers that run one after another.

    Attributes:
        acc: float32, partial outputs; stats: float32, their references and masses.
        whole: int8, split: bytes: queries as operands; terms: float32, their scales, sums and constants.
    """

    acc: Tensor
    stats: Tensor
    whole: Tensor
    split: Tensor
    terms: Tensor

    @classmethod
    def on(cls, device: torch.device | str) -> Workspace:
        """An empty workspace; plans make it as large as they need."""
        floats = torch.zeros(0, device=device)
        return cls(
            floats, floats, torch.zeros(0, dtype=torch.int8, device=device), floats.to(torch.uint8), floats.clone()
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.acc, self.stats, self.whole, self.split, self.terms))

    def reserve(self, **sizes: int) -> None:
        """Make every named buffer at least as long."""
        for name, size in sizes.items():
            held: Tensor = getattr(self, name)
            if held.numel() < size:
                setattr(self, name, torch.empty(size, dtype=held.dtype, device=held.device))


@dataclass
class StepPlan:
    """The work items of one layer, for queries of one shape.

    Attributes:
        layouts: the layer's page layouts, best first.
        rows: sequences x KV heads.
        columns: query heads per KV head x queries.
        capacity: tokens that a row's window may hold.
        dtype: the model's.
        shares: into how many shares the bytes are cut, so that all items' programs run at once where rows are few.
        items: int32 [items, 4]: row, tier (the window is the last), first page or window step, how many.
        offsets: int32 [rows + 1], first item of every row.
        space: where partial results go.
    """

    layouts: tuple[PageLayout, ...]
    rows: int
    columns: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    space: Workspace
    programs: int
    warps: int = WARPS
    items: Tensor = field(init=False)
    offsets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        value_dim = self.layouts[0].value.dim
        key_dim = self.layouts[0].key.dim
        empty = functools.partial(torch.empty, dtype=torch.int32, device=self.device)
        self.items, self.offsets = empty(self.count, 4), empty(self.rows + 1)
        units, tiles = self.count * self.tiles, self.rows * self.tiles
        entries = tiles * 2 * COLUMNS * row_entries(key_dim)
        self.space.reserve(
            acc=units * COLUMNS * value_dim,
            stats=units * COLUMNS * 2,
            whole=entries,
            split=entries * self.dtype.itemsize,
            terms=tiles * 3 * COLUMNS,
        )

    @property
    def tiles(self) -> int:
        return -(-self.columns // COLUMNS)

    @property
    def shares(self) -> int:
        places = self.programs // self.tiles
        return max(1, places - self.rows * self.pieces, places // 2)

    @property
    def pieces(self) -> int:
        """Tiers and the window."""
        return len(self.layouts) + 1

    @property
    def count(self) -> int:
        """Work items, empty ones included."""
        return self.rows * self.pieces + self.shares - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's own tensors, without the workspace."""
        return self.items.nbytes + self.offsets.nbytes

    def refresh(self, lengths: Tensor) -> None:
        """Lay the work out anew, in place and without synchronisation.

        Args:
            lengths: int32 [rows, 2], packed tokens per tier.
        """
        steps = torch.full_like(lengths[:, :1], -(-self.capacity // WINDOW_STEP))
        pages = [(lengths[:, t, None] + x.tokens - 1) // x.tokens for t, x in enumerate(self.layouts)]
        length = torch.cat([*pages, steps], 1).long().flatten()  # [rows * pieces] pages or window steps
        size = self._bytes.repeat(self.rows)
        end = (length * size).cumsum(0)
        begin, total = end - length * size, end[-1]

        least = self.warps * int(min(layout.page_bytes for layout in self.layouts))
        used = (total // least).clamp(1, self.shares)
        cut = torch.minimum(total * self._numbers // used, total)  # [shares - 1] bytes before every cut
        piece = torch.searchsorted(end, cut, right=True).clamp_(max=end.numel() - 1)
        stride = size[piece] * self.warps
        page = torch.minimum((cut - begin[piece] + stride // 2) // stride * self.warps, length[piece])

        at_cut = self._numbers + piece
        pieces = torch.arange(end.numel(), device=self.device)
        at_piece = pieces + torch.searchsorted(piece, pieces)
        first = torch.zeros(self.count, dtype=torch.long, device=self.device)
        first[at_cut] = page
        owner = torch.empty_like(first)
        owner[at_cut], owner[at_piece] = piece, pieces
        last = length[owner]
        last[:-1] = torch.where(owner[1:] == owner[:-1], first[1:], last[:-1])
        self.items.copy_(torch.stack([owner // self.pieces, owner % self.pieces, first, last - first], 1))
        self.offsets[:-1] = at_piece[:: self.pieces]
        self.offsets[-1:].fill_(self.count)  # a number put into one place would be waited for

    @functools.cached_property
    def registers(self) -> int | None:
        """Registers that a thread of the decode kernel may have; None: the compiler decides."""
        return None if self.dtype == torch.float32 else registers_of(capability_of(self.device), self.layouts)

    @functools.cached_property
    def _bytes(self) -> Tensor:
        """int64 [pieces]: bytes of a page of every tier, and of a step of the window."""
        first = self.layouts[0]
        step = WINDOW_STEP * (first.key.dim + first.value.dim) * self.dtype.itemsize
        return sent([*(layout.page_bytes for layout in self.layouts), step], self.device)

    @functools.cached_property
    def _numbers(self) -> Tensor:
        return torch.arange(1, self.shares, device=self.device)


def programs_on(device: torch.device) -> int:
    """Programs of a decode launch that fill the device."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    known = max((c for c in PROGRAMS_PER_SM if c <= capability_of(device)), default=80)
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM[known]


def pages_at_once(layouts: tuple[PageLayout, ...], dtype: torch.dtype, room: int) -> int:
    """Pages that a program reads at once, with so many bytes of shared memory."""
    return WARPS if WARPS * page_room(layouts, dtype) <= room else 1


def stages_of(full: bool) -> tuple[int, int]:
    """Pipeline stages of the page loops of the two tiers; `full`: float32 products, whose tiles are large."""
    return (1, 1) if full else (2, 2)


def registers_of(capability: int, layouts: tuple[PageLayout, ...]) -> int | None:
    """Registers that a thread may have; None: the compiler decides."""
    first = layouts[0]
    if first.key.dim > 128:
        return None
    if not first.key.bits:  # exact pages are large: shared memory holds three programs at most
        return 224
    return MAX_REGISTERS[max((c for c in MAX_REGISTERS if c <= capability), default=90)]


def capability_of(device: torch.device) -> int:
    """89 for compute capability 8.9; 0 without CUDA."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def row_entries(dim: int) -> int:
    """Entries of a query's row as the kernels hold it."""
    return power_of_two(dim, 32)
