"""The benchmark on the CPU: what its rows say, that it resumes and stops in time, and how it judges."""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hfkv.bench import caches, decode, goals, packs, plots, run, tables, timing
from hfkv.bench.results import COLUMNS, KEY, LARGEST, MEASURED, Cell, Results
from hfkv.bench.session import Session
from hfkv.bench.sizes import GPU, Shape, sizes_for
from hfkv.cache import LeanKVCache
from hfkv.cli import main
from hfkv.quant import Codec, PageLayout

CPU = torch.device("cpu")
SHAPE = Shape(8, 2, 64)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Timings mean nothing here: what is copied and written beside them may be small."""
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(timing.COLD_BYTES, "cpu", 1 << 20)


def session(budget=None):
    return Session(CPU, torch.float32, sizes_for(CPU, quick=True), budget)


def read(path):
    with (path / run.CSV).open(newline="") as file:
        return list(csv.DictReader(file))


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", run.PARTS)
def test_every_part_fills_its_rows(part, tmp_path, capsys):
    assert main(["bench", "--device", "cpu", "--quick", "--part", part, "--out", str(tmp_path)]) == 0
    rows = read(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    good = [row for row in rows if row["status"] == "ok"]
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    assert ({"k8v4", "mixed"} if part != packs.PART else set(packs.KINDS)) <= {row["cache"] for row in good}
    assert all(float(row["ms"]) > 0 and float(row["copy_gbps"]) > 0 for row in good)
    text = capsys.readouterr().out
    assert f"{part}: {run.PARTS[part].title}" in text
    assert "not measured" in text
    if plots.available():
        assert (tmp_path / f"{part}.png").stat().st_size > 5000


@pytest.mark.parametrize("name", caches.LEAN)
def test_bytes_are_the_report_s(name, monkeypatch):
    made = []
    step = decode.lean_step

    def noted(*args):
        made.append(step(*args))
        return made[-1]

    monkeypatch.setattr(decode, "lean_step", noted)
    (row,) = decode.measure(session(), Cell("decode", name, SHAPE, 1, 700, 3))
    cache = made[0][0]
    report = cache.report()
    assert cache.get_seq_length() == 700
    assert row["physical_bytes"] == report.physical_bytes
    assert row["exact_bytes"] == report.exact_bytes == caches.exact_bytes(SHAPE, 1, 3, 700, torch.zeros(0))
    assert row["gbps"] == pytest.approx(row["read_bytes"] / row["ms"] / 1e6)
    assert row["read_bytes"] < report.physical_bytes


def test_read_bytes_are_codes_scales_and_window():
    cache, _ = decode.lean_step(session(), "k8v4", SHAPE, 3, 700)
    layout = PageLayout(*(Codec.of((8, 4), side, 64, torch.float32, "fitted") for side in ("key", "value")), 64, False)
    window = 64 + 16
    assert layout.token_bytes == 64 + 32 + 4
    assert caches.read_bytes(cache) == 6 * ((700 - window) * layout.token_bytes + window * 2 * 64 * 4)


@pytest.mark.parametrize("name", caches.LEAN)
def test_a_step_can_be_repeated(name):
    cache, step = decode.lean_step(session(), name, SHAPE, 2, 300)
    first, held = step(), str(cache.report())
    assert torch.equal(first, step())
    assert str(cache.report()) == held
    assert first.shape == (2, 1, 8, 64)


def test_references_are_the_same_attention():
    outs = []
    for name in decode.CPU_REFERENCES:
        torch.manual_seed(0)
        outs.append(decode.reference_step(session(), name, SHAPE, 2, 100)())
    torch.testing.assert_close(outs[0].flatten(), outs[1].flatten())


def test_a_kernel_that_does_not_exist_is_unavailable():
    step = decode.reference_step(session(), "cudnn", SHAPE, 1, 100)
    with pytest.raises(caches.Unavailable, match="cudnn"), decode.exact_kernel("cudnn"):
        step()


def test_filling_in_blocks_is_filling(monkeypatch):
    """Blocks leave the same number of tokens in the same tiers and pages of the same size as one long prompt."""
    reports = []
    for block in (caches.BLOCK_BYTES, 1):
        monkeypatch.setattr(caches, "BLOCK_BYTES", block)
        cache = caches.new_cache("mixed")
        caches.fill(cache, SHAPE, 2, 1, 1500, torch.zeros(0))
        caches.fill(cache, SHAPE, 2, 1, 1, torch.zeros(0))  # a continued prompt is judged at the next forward
        assert cache.get_seq_length() == 1501
        reports.append(cache.report().layers[1])
        pages = {layout.tokens for layout in cache.compressed[1].packed.layouts}
        assert pages == {LeanKVCache(cache.config).page_tokens(1500, 2)}
    one, many = ({name: int(count.sum()) for name, count in r.tokens.items()} for r in reports)
    assert one == many


@pytest.mark.parametrize("name", ["dynamic", "static", "k8v4"])
def test_generate_goes_on_from_a_filled_cache(name):
    own = session()
    cell = Cell("generate", name, own.sizes.model.heads, 2, 200, 2)
    row = run.PARTS["generate"].measure(own, cell)[0]
    assert row["sequences"] == 2
    assert row["physical_bytes"] >= (1.0 if name != "k8v4" else 0.2) * row["exact_bytes"]


# ---- the run -----------------------------------------------------------------------------------------------------


def fake_part(outcomes, cells=4):
    """A part whose cells do what `outcomes` says: an exception, or a row."""
    made = [Cell("decode", f"c{i}", SHAPE, 1, 100, 1) for i in range(cells)]
    asked = []

    def measure(session, cell):
        asked.append(cell.cache)
        outcome = outcomes.get(cell.cache)
        if outcome is not None:
            raise outcome
        return [{"status": "ok", "ms": 1.0}]

    return run.Part("fake", lambda sizes, device: made, measure), asked


def test_finished_cells_are_kept(tmp_path):
    part, asked = fake_part({})
    results = Results(tmp_path / run.CSV, "m", "float32")
    assert run.measure_part("decode", part, session(), results) == 0
    again = Results(tmp_path / run.CSV, "m", "float32")
    assert run.measure_part("decode", part, session(), again) == 0
    assert asked == ["c0", "c1", "c2", "c3"]
    other_machine = Results(tmp_path / run.CSV, "another", "float32")
    assert run.measure_part("decode", part, session(), other_machine) == 0
    assert len(asked) == 8
    assert len(read(tmp_path)) == 8


def test_what_fails_is_kept_told_and_tried_again_last(tmp_path, capsys):
    wrong = {
        "c0": RuntimeError("broken\nin detail"),
        "c1": torch.OutOfMemoryError("too much"),
        "c2": caches.Unavailable("no such kernel"),
    }
    part, asked = fake_part(wrong)
    results = Results(tmp_path / run.CSV, "m", "float32")
    assert run.measure_part("decode", part, session(), results) == 1
    said = {row["cache"]: (row["status"], row["note"]) for row in read(tmp_path)}
    assert said["c0"] == ("failed: RuntimeError", "broken")
    assert said["c1"] == ("out of memory", "too much")
    assert said["c2"] == ("unavailable", "no such kernel")
    assert said["c3"][0] == "ok"
    assert "failed: RuntimeError broken" in capsys.readouterr().out
    more, asked = fake_part({}, cells=5)
    assert run.measure_part("decode", more, session(), results) == 0
    assert asked == ["c4", "c0", "c2"]


def test_a_cell_that_takes_too_long_is_broken_off(tmp_path, monkeypatch):
    """It counts as not measured, and what runs in it cannot take the end for an error of its own."""

    def measure(session, cell):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.05)

    monkeypatch.setattr(run, "OVERTIME", 0.2)
    session = Session(torch.device("cpu"), torch.float32, sizes_for(torch.device("cpu"), True), budget=0.5)
    cell = Cell(decode.PART, "k8v4", Shape(8, 2, 64), 1, 512, 1)
    results = Results(tmp_path / "bench.csv", "here", "float32")
    part = run.Part("endless", lambda sizes, device: [cell, replace(cell, cache="k4v4")], measure)
    assert run.measure_part("decode", part, session, results) == 0
    assert [row["status"] for row in results.rows] == ["stopped by the budget"]
    assert not results.finished(cell)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_budget_stops_between_cells(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    part, asked = fake_part({})
    fast = part.measure

    def slow(session, cell):
        now[0] += 10
        return fast(session, cell)

    results = Results(tmp_path / run.CSV, "m", "float32")
    run.measure_part("decode", replace(part, measure=slow), session(budget=25), results)
    assert asked == ["c0", "c1"]  # 5 seconds are left then, and a cell takes 10
    assert "2 cells are left" in capsys.readouterr().out
    assert len(read(tmp_path)) == 2


def test_a_long_run_that_stops_is_not_finished(tmp_path):
    cell = Cell("long", "k8v4", SHAPE, 2, 10, 1, last_step=30)
    results = Results(tmp_path / run.CSV, "m", "float32")
    results.add(cell, [{"status": "ok", "step": step, "ms": 1.0} for step in (10, 20)])
    assert not results.finished(cell)
    results.add(cell, [{"status": "ok", "step": step, "ms": 2.0} for step in (10, 20, 30)])
    assert results.finished(cell)
    assert [row["ms"] for row in results.rows] == ["2", "2", "2"]


def test_a_csv_of_another_version_is_refused(tmp_path, capsys):
    (tmp_path / run.CSV).write_text("part,ms\ndecode,1\n")
    assert main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 2
    assert "--fresh" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_a_device_that_does_not_exist_is_refused(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_the_gpu_sizes_are_what_was_promised():
    assert GPU.decode_tokens == tuple(1024 * 2**i for i in range(8))
    assert GPU.decode_batches == (1, 8, 32)
    assert [(s.q_heads, s.kv_heads, s.head_dim) for s in GPU.decode_shapes] == [(32, 8, 128), (64, 8, 64)]
    wanted = decode.cells(GPU, torch.device("cuda"))
    assert (wanted[0].tokens, wanted[0].batch) == goals.SPEEDUP_AT
    assert len({(c.tokens, c.batch, c.shape, c.cache) for c in wanted if c.cache in caches.LEAN}) == 8 * 3 * 2 * 4
    assert GPU.largest_tokens == goals.LARGEST_AT
    assert max(GPU.single_tokens) > goals.SINGLE_BEYOND


def test_a_step_that_cannot_be_captured_is_timed_without_a_graph(monkeypatch):
    clock = timing.Clock(CPU, 0.01)
    monkeypatch.setattr(clock, "device", torch.device("cuda"))
    monkeypatch.setattr(clock, "_repeat", lambda step, count: [2.0] * count)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "captured", refuse)
    timed = clock.time(lambda: None)
    assert (timed.ms, timed.eager_ms, timed.launch) == (2.0, 2.0, "eager")
    assert timed.note == "no CUDA graph: operation not permitted when stream is capturing"
    monkeypatch.setattr(timing, "captured", lambda step: step)
    assert clock.time(lambda: None).launch == "graph"


# ---- tables and goals --------------------------------------------------------------------------------------------


def row(part, cache, tokens, batch, **measured):
    given = dict.fromkeys((*KEY, *MEASURED), "")
    shape = dict(q_heads="32", kv_heads="8", head_dim="128", layers="32", machine="m", dtype="bfloat16")
    own = dict(part=part, cache=cache, tokens=str(tokens), batch=str(batch), status="ok", sequences=str(batch))
    return {**given, **shape, **own, **{name: str(value) for name, value in measured.items()}}


def verdicts(rows):
    return {(goal.text, goal.measured): goal.verdict for goal in goals.judge(rows)}


def only(rows, part):
    found = [goal for goal in goals.judge(rows) if part in goal.text and goal.measured]
    assert len(found) == 1
    return found[0]


def test_nothing_measured_is_no_verdict():
    assert set(verdicts([]).values()) == {"not measured"}
    assert len(goals.judge([])) == 4 + 4 + 2 + 1 + 1 + 1
    failed = row("flush", "k8v4", 1000, 1, flush_share=0.001) | {"status": "out of memory"}
    assert set(verdicts([failed]).values()) == {"not measured"}


@pytest.mark.parametrize("share, verdict", [(0.81, "reached"), (0.79, "not reached")])
def test_the_least_share_of_the_copy_bandwidth_counts(share, verdict):
    rows = [
        row("decode", "k8v4", 8192, 8, copy_share=share),
        row("decode", "k8v4", 131072, 8, copy_share=0.9),
        row("decode", "k8v4", 1024, 1, copy_share=0.05),  # too short to count
    ]
    goal = only(rows, "copy bandwidth")
    assert goal.verdict == verdict
    assert "of 2" in goal.measured


def test_speed_is_judged_against_the_best_reference_launched_alike():
    rows = [
        row("decode", "k8v4", 32768, 8, ms=1.0, eager_ms=1.5, launch="graph", copy_share=0.9),
        row("decode", "flash", 32768, 8, ms=2.2, eager_ms=2.3, launch="graph"),
        row("decode", "cudnn", 32768, 8, ms=2.0, eager_ms=4.0, launch="graph"),
    ]
    goal = only(rows, "2.1x")
    assert goal.verdict == "not reached"
    assert "2.00x" in goal.measured
    assert "cudnn" in goal.measured
    rows[0] |= {"ms": "1.0", "eager_ms": "1.0", "launch": "eager"}
    goal = only(rows, "2.1x")
    assert goal.verdict == "reached"
    assert "2.30x" in goal.measured
    assert "flash" in goal.measured


def test_prompts_are_judged_by_time_and_peak():
    rows = [
        row(
            "prompt", "k8v4", 8192, 1, ms=101.9, reference_ms=100, peak_bytes=5000, physical_bytes=900, exact_bytes=1600
        ),
        row("prompt", "k8v4", 4096, 1, ms=150, reference_ms=100),
        row("prompt", "no cache", 8192, 1, ms=90, peak_bytes=4000),
    ]
    assert only(rows, "over the exact cache").verdict == "reached"
    assert only(rows, "peak").verdict == "reached"  # 1000 above, 900 + 2 * 1600 / 32 allowed
    rows[0] |= {"ms": "103", "peak_bytes": "5001"}
    assert only(rows, "over the exact cache").verdict == "not reached"
    assert only(rows, "peak").verdict == "not reached"


def test_generate_is_judged_at_the_largest_batches_and_at_one():
    rows = [
        row("generate", "dynamic", 16384, LARGEST, tokens_per_second=100) | {"sequences": "20"},
        row("generate", "k8v4", 16384, LARGEST, tokens_per_second=301) | {"sequences": "60"},
        row("generate", "dynamic", 8192, 1, tokens_per_second=40),
        row("generate", "k8v4", 8192, 1, tokens_per_second=39),
        row("generate", "dynamic", 4096, 1, tokens_per_second=40),
        row("generate", "k8v4", 4096, 1, tokens_per_second=10),  # not beyond 4k
    ]
    goal = only(rows, "largest batch")
    assert goal.verdict == "reached"
    assert "batch 60 against 20" in goal.measured
    assert only(rows, "batch 1").verdict == "not reached"


def test_flush_share_is_the_worst():
    rows = [row("flush", "k8v4", 1000, 1, flush_share=0.005), row("flush", "mixed", 1000, 8, flush_share=0.011)]
    goal = only(rows, "flush")
    assert goal.verdict == "not reached"
    assert "mixed" in goal.measured


def test_tables_say_what_is_missing():
    rows = [
        row("decode", "flash", 1024, 1, ms=1.0, eager_ms=1.0, launch="graph", physical_bytes=2**20, exact_bytes=2**20),
        row("decode", "k8v4", 1024, 1, ms=0.5, eager_ms=1.0, launch="graph", physical_bytes=2**19, exact_bytes=2**20),
        row("decode", "cudnn", 1024, 1, note="no kernel") | {"status": "unavailable"},
    ]
    lines = tables.show("decode", rows).splitlines()
    assert "2.00x" in next(line for line in lines if line.startswith("k8v4"))
    assert "0.500" in next(line for line in lines if line.startswith("k8v4"))
    assert lines[-1] == "cudnn: unavailable, no kernel (at 1024 x 1)"
    assert "not measured" in tables.show_goals(goals.judge(rows))


# ---- the GPU tests' own runner -----------------------------------------------------------------------------------


def gpu_tests(folder, *wanted, **environment):
    """(status, lines) of the runner in a folder."""
    done = subprocess.run(
        [sys.executable, str(folder), *wanted],
        cwd=ROOT,
        env={**os.environ, "HFKV_TEST_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_the_gpu_tests_run_without_pytest():
    """On the CPU at small sizes; what asks CUDA itself is skipped."""
    status, lines = gpu_tests(ROOT / "tests/gpu", "float64_exact", "kernels::test_flush_k8v4", "test_gpu_steps")
    assert status == 0 and lines[-1] == "4 passed, 21 skipped, 0 failed", lines


SUPPORT = """
measured = []
def described(): return "none"
"""
SPOILT = """
import os, time
from gpu_support import measured

def test_a_crash(): os.kill(os.getpid(), 11)
def test_b_wrong():
    print("to nobody")
    assert sum([1]) == 2, "one is not two"
def test_c_hang(): time.sleep(600)
def test_d_good(): measured.append("1e-4 of 1e-3")
"""


def test_one_gpu_test_takes_no_other_along(tmp_path):
    """A crash, a hang and a failure are told with what there is to know, and what comes behind is run."""
    shutil.copy(ROOT / "tests/gpu/__main__.py", tmp_path)
    (tmp_path / "gpu_support.py").write_text(SUPPORT)
    (tmp_path / "test_spoilt.py").write_text(SPOILT)
    status, lines = gpu_tests(tmp_path, HFKV_TEST_LIMIT="2")
    text = "\n".join(lines)
    assert status == 1 and "1 passed, 0 skipped, 3 failed" in lines, text
    assert text.count("its process ended with status -11") == 2 and "once more with CUDA_LAUNCH_BLOCKING=1" in text
    assert "AssertionError: one is not two" in text and "test_b_wrong: assert sum([1]) == 2" in text
    assert "it took too long and was ended" in text and "in test_c_hang" in text
    assert any(line.startswith("passed   test_spoilt::test_d_good") and "1e-4 of 1e-3" in line for line in lines), text
    status, lines = gpu_tests(tmp_path, "test_d", HFKV_TEST_SECONDS="0")
    assert status == 0 and "0 passed, 1 skipped, 0 failed" in lines, lines


def test_a_difference_is_told_by_its_places(monkeypatch):
    monkeypatch.setenv("HFKV_TEST_DEVICE", "cpu")
    monkeypatch.syspath_prepend(ROOT / "tests/gpu")
    from gpu_support import check_close, check_equal, measured

    want = torch.ones(2, 3)
    got = want.clone()
    check_close(got, want, 1e-3, "ones")
    assert measured == ["ones 0.0e+00 of 1e-03"]
    got[1, 2], got[1, 1] = 3, float("nan")
    with pytest.raises(
        AssertionError, match=r"ones: .*nan.*2 of 6 entries.*first at \[1, 1\]: nan for 1.*1 are not fin"
    ):
        check_close(got, want, 1e-3, "ones")
    with pytest.raises(
        AssertionError, match=r"bytes: 1 of 2 entries of \(2,\) torch.int64 differ; first at \[1\]: 3 for 2"
    ):
        check_equal(torch.tensor([1, 3]), torch.tensor([1, 2]), "bytes")
    with pytest.raises(AssertionError, match="shape"):
        check_close(got, want[:1], 1e-3)
