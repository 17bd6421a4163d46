"""Every kernel with its programs in other orders: equal to the last bit, and no program in another's way."""

import copy
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from oracle import make_layer, poison
from races import Races
from test_compaction import flush, packed_layer
from test_decode_attention import make_past, make_queries

from hfkv import Packed
from hfkv.attend import Call
from hfkv.backends.fused import FusedKernels
from hfkv.backends.packs import PackKernels
from hfkv.fill import Fill
from hfkv.kernels.replay import Asking
from hfkv.kernels.triton import append, chunk_attention, kvcrush, replay
from hfkv.kernels.triton.decode_attention import attend_step, plan_step
from hfkv.kernels.triton.packing import seal
from hfkv.kernels.triton.tiles import Pages
from hfkv.kernels.triton.work import Workspace
from hfkv.paging.sharing import select_rows
from hfkv.window import Sequences, Window

K8V4_K4V2 = ((8, 4), (4, 2))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def held(layer):
    """All that a layer's kernels have made: tables, counters and the pool's memory."""
    pool = layer.pool
    lists = [x for c in pool._classes for x in (c.ring, c.pointers)]
    memory = [arena.memory for arena in pool._arenas.values()]
    return [layer.table.ids, layer.table.lengths, pool._used, *lists, *memory]


@pytest.fixture(scope="module")
def flushed():
    """Layers as their second flush finds them: two tiers, one that other rows share pages of, and exact numbers."""
    layers = {}
    for name, tiers, dtype in (("coded", K8V4_K4V2, torch.float32), ("exact", ("exact", (4, 3)), torch.float16)):
        layers[name] = packed_layer(2, tiers, (16, 20), dtype, 16)
        flush(layers[name], [70, 33], 0, torch.Generator().manual_seed(0), [0.6, 0.4, 0.0], on_device=False)
    layers["shared"] = copy.deepcopy(layers["coded"])
    select_rows(layers["shared"], torch.tensor([1, 1, 0]))
    return layers


def second_flush(layers, name):
    layer = copy.deepcopy(layers[name])
    generator = torch.Generator().manual_seed(1)
    flush(layer, [20, 0, 37][: layer.rows], 70, generator, [0.3, 0.3, 0.4], on_device=True)
    return held(layer)


COMPACTION = {"pack_kernel", "rescore_kernel", "move_kernel", "clear_kernel", "release_kernel", "allocate_kernel",
              "recode_kernel"}  # fmt: skip


def step(layers, tiers=K8V4_K4V2, counts=((100, 70), (0, 150)), queries=2, tokens=32):
    layer, _, _ = make_layer(counts, tiers, 32, 32, tokens, dtype=torch.float16)
    poison(layer)
    past = make_past(layer, 2, [21], 40, 32, torch.float16)
    q, call = make_queries(past, 5, queries, torch.float16), Call(0.2, None, torch.arange(10.0))
    if any(isinstance(tier, Packed) for tier in tiers):
        return [PackKernels(torch.device("cpu"), {}).attend_step(past, q, call)]
    return [attend_step(past, q, call, plan_step(layer, past.window, 5 * queries, Workspace.on("cpu")))]


def observed(layers):
    layer, _, _ = make_layer([(40, 70), (5, 0)], K8V4_K4V2, 32, 32)
    window = Fill(None, torch.tensor([9]), 9, torch.arange(9)[None], 124, torch.zeros(1))
    tokens = SimpleNamespace(
        packed=layer,
        window=SimpleNamespace(heads=2),
        queries=SimpleNamespace(kept=lambda: random(1, 6, 5, 32), positions=[119, 120, 121, 122, 123], stands_for=5),
        call=Call(0.3, None, torch.arange(6.0)),
    )
    stored = [parts for _, parts in FusedKernels.stored(layer, True)]
    k = random(1, 2, 9, 32)
    return [FusedKernels.observe_stored([tokens], [Sequences(k, k, window)], stored), *(p["score"] for p in stored)]


def continued(layers):
    layer, _, _ = make_layer([(100, 170), (5, 0)], K8V4_K4V2, 32, 32)
    q, k = random(1, 6, 40, 32), random(1, 2, 47, 32)
    window = Window(random(1, 2, 12, 32), random(1, 2, 12, 32))
    terms = (0.2, None, torch.arange(6.0), True)
    before = (window.k, window.v, torch.tensor([9]))
    return list(chunk_attention.attend_chunk(Pages.of(layer), layer.basis, before, k, k, q, None, *terms))


def stepped(layers):
    counts, kept = torch.tensor([3, 5, 0] * 10), torch.tensor([1, 4, 0])
    windows, queries = torch.zeros(2, 30, 2, 24, 20), torch.zeros(30, 6, 3, 20)
    append.begin_step(counts, kept, 4, 3)
    append.append_step(*random(2, 30, 2, 1, 20), random(30, 6, 1, 20), *windows, counts, queries, kept)
    return [counts, kept, windows, queries]


def elected(layers):
    there = random(2, 5, 150, seed=1) > -1
    distance = kvcrush.crush_distances(random(2, 5, 150), there, None)
    return [distance, kvcrush.elect(there[:, 0], distance, torch.tensor([9, 40]), 5)]


def sealed(layers):
    layer = make_layer([(64, 64), (64, 0)], (Packed(), Packed(key_bits=4, value_bits=2)), 32, 20, 64)[0]
    pages = [layer.pool.gather(layer.classes[t], layer.table.pages(t, layer.page_counts(t))[0]) for t in range(2)]
    return [x for layout, own in zip(layer.layouts, pages, strict=True) for x in seal(layout, own)]


DECODE = {"prepare_queries", "decode_items", "combine_items"}


def replayed(layers):
    q, k = random(1, 4, 150, 16), random(1, 2, 150, 16, seed=1)
    asking = Asking(torch.tensor([140]), torch.tensor([0]))
    return [replay.most_received(q, k, *terms, 0.3, None, None) for terms in ((None, None), (asking, k[:, :, :4]))]


def read(layers):
    layer = layers["coded"]
    return [FusedKernels.vectors(layer, side, tier, 80) for side in ("key", "value") for tier in range(2)]


SCENARIOS = {
    "flush": (lambda layers: second_flush(layers, "coded"), COMPACTION),
    "flush-exact": (lambda layers: second_flush(layers, "exact"), COMPACTION),
    "flush-shared": (lambda layers: second_flush(layers, "shared"), COMPACTION | {"copy_kernel"}),
    "step": (step, DECODE),
    "step-odd": (lambda layers: step(layers, (("exact"), (4, 3)), ((20, 40),) * 2, 1, 16), DECODE),
    "step-packs": (
        lambda layers: step(layers, ((8, 4), Packed()), ((5, 200), (70, 64)), 1, 64),
        DECODE | {"attend_packs"},
    ),
    "observe": (observed, {"observe_lse", "observe_scores", "read_kernel", "rescore_kernel"}),
    "chunk": (continued, {"prompt_forward", "attend_pages_forward", "join_forward"}),
    "append": (stepped, {"count_step", "append_tokens"}),
    "kvcrush": (elected, {"ones_kernel", "distance_kernel", "elect_kernel"}),
    "seal": (sealed, {"seal_kernel"}),
    "replay": (replayed, {"replay_kernel"}),
    "vectors": (read, {"unpack_kernel"}),
}


@pytest.mark.parametrize("scenario, kernels", SCENARIOS.values(), ids=SCENARIOS)
def test_programs_in_any_order(scenario, kernels, flushed, monkeypatch):
    monkeypatch.setattr(chunk_attention, "PROGRAMS", 64)
    monkeypatch.setattr(chunk_attention, "TILES_EACH", 1)  # several parts
    monkeypatch.setattr(replay, "BLOCK", 64)
    want = scenario(flushed)
    for order in ("reversed", "shuffled"):
        with monkeypatch.context() as patch:
            races = Races(patch, order)
            got = scenario(flushed)
        assert set(races.launches) >= kernels
        assert races.found == set()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- what must be found ----------------------------------------------------------------------------------------------


@triton.jit
def shifting(x_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i + 1, tl.load(x_ptr + i))


@triton.jit
def counting(x_ptr):
    tl.store(x_ptr, tl.program_id(0))


@triton.jit
def returning(x_ptr):
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + i, i)
    tl.store(x_ptr + 64 + i, tl.load(x_ptr + i // 4 * 4))


@triton.jit
def crowding(x_ptr):
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + i // 2, i)


@triton.jit
def growing(x_ptr):
    i = tl.program_id(0) * 1_000_000_000 + tl.arange(0, 4) * 0
    tl.store(x_ptr + tl.program_id(0), tl.max(i, 0))


@triton.jit
def leaving(x_ptr):
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + i, tl.load(x_ptr + i).to(tl.uint8) >> (tl.arange(0, 4) * 4).to(tl.uint8))


@triton.jit
def independent(x_ptr):
    i = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)
    tl.atomic_add(x_ptr + 100, 1)


@pytest.mark.parametrize(
    "kernel, flaws",
    [
        (shifting, {"a program reads what another one writes"}),
        (counting, {"several programs write one byte"}),
        (returning, {"a program reads what it has written"}),
        (crowding, {"several lanes write one byte"}),
        (growing, {"a number of 32 bits overflows"}),
        (leaving, {"a shift by all bits of a number, or more"}),
        (independent, set()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_flaws_are_found(kernel, flaws, monkeypatch):
    races = Races(monkeypatch)
    kernel[(4,)](torch.zeros(128, dtype=torch.int32))
    assert races.found == {f"{kernel.__name__}: {flaw}" for flaw in flaws}


def test_masked_lanes_are_not_zero(monkeypatch):
    @triton.jit
    def doubling(x_ptr):
        i = tl.arange(0, 4)
        tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < 2) * 2)

    Races(monkeypatch)
    for dtype in (torch.float32, torch.float16, torch.int32):
        x = torch.ones(4, dtype=dtype)
        doubling[(1,)](x)
        assert x[:2].tolist() == [2, 2] and not (x[2:] == 0).any()
