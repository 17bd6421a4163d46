"""Run the GPU tests where there is no pytest: `python tests/gpu [part of a name ...]`.

Tests run in processes of their own, several at once: most of their time is the compiler's, and a kernel that crashes
or hangs takes its process along and no other test. A crash is run once more with synchronous launches, which tell its
place.

HFKV_TEST_SECONDS ends the run in time, HFKV_TEST_LIMIT one test (150 s), HFKV_TEST_WORKERS is how many run at once.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections import deque
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SERVE = "--serve"
FIRST = ("test_gpu_kernels", "test_gpu_attention", "test_gpu_steps", "test_gpu_graphs", "test_gpu_generate")
"""What tells the most comes first; other files follow by name."""

LIMIT, GRACE, STARTING = 150.0, 30.0, 300.0
"""Seconds that a test may take, that those which run when HFKV_TEST_SECONDS end may go on, and that a start takes."""

OUR_FRAMES, MESSAGE_LINES, LOG_LINES = 6, 14, 16


def main(wanted: list[str]) -> int:
    """Run every test whose `file::name` contains one of `wanted` (all, if there are none); 1 where one failed."""
    run = Run(wanted)
    threads = [threading.Thread(target=run.drive) for _ in range(_workers())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return run.conclude()


def _workers() -> int:
    if os.environ.get("HFKV_TEST_DEVICE", "cuda") != "cuda":
        return int(os.environ.get("HFKV_TEST_WORKERS", "1"))
    return int(os.environ.get("HFKV_TEST_WORKERS", str(max(1, min(6, (os.cpu_count() or 1) // 2)))))


class Run:
    """What is left to do and what has come of it; worker threads share it."""

    def __init__(self, wanted: list[str]) -> None:
        self._wanted, self._lock = wanted, threading.Lock()
        self._left: deque[str] | None = None
        self._results: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
        self._begun = time.monotonic()
        self._budget = float(os.environ.get("HFKV_TEST_SECONDS", "inf"))
        self._limit = float(os.environ.get("HFKV_TEST_LIMIT", LIMIT))
        self._unready = ""

    @property
    def _remaining(self) -> float:
        return self._budget - (time.monotonic() - self._begun)

    def drive(self) -> None:
        """Give tests to one worker process after the other, until none is left."""
        worker = self._begin()
        while worker is not None and (name := self._take()) is not None:
            start = time.monotonic()
            if self._remaining <= 0:
                self._note(name, "skipped", f"HFKV_TEST_SECONDS={self._budget:.0f} are used up", 0.0)
                continue
            reply = worker.ask(name, min(self._limit, self._remaining + GRACE))
            if reply is None and self._remaining <= 0:
                reply = {"outcome": "skipped", "said": f"HFKV_TEST_SECONDS={self._budget:.0f} are used up", "usable": 0}
            elif reply is None:
                reply = {"outcome": "failed", "said": worker.death(), "usable": False}
            if not reply["usable"]:
                worker.stop()
                if reply["outcome"] == "failed" and not worker.late:
                    reply["said"] += self._again(name)
                worker = self._begin()
            self._note(name, reply["outcome"], reply["said"], time.monotonic() - start)
        if worker is not None:
            worker.stop()

    def _begin(self, **environment: str) -> Worker | None:
        """A worker that is ready; the first one says which tests there are."""
        worker = Worker(environment)
        hello = worker.read(STARTING)
        with self._lock:
            if hello is None:
                self._unready = worker.death()
                return None
            if self._left is None:
                print(hello["device"], flush=True)
                tests = [name for name in hello["tests"] if not self._wanted or any(x in name for x in self._wanted)]
                self._left = deque(tests)
        return worker

    def _take(self) -> str | None:
        with self._lock:
            return self._left.popleft() if self._left else None

    def _again(self, name: str) -> str:
        """Where a test that has spoilt its process fails when every launch is waited for."""
        worker = self._begin(CUDA_LAUNCH_BLOCKING="1") if self._remaining > 0 else None
        if worker is None:
            return ""
        reply = worker.ask(name, min(self._limit, self._remaining + GRACE)) or {"said": worker.death()}
        worker.stop()
        return f"\nonce more with CUDA_LAUNCH_BLOCKING=1: {reply['said'] or 'it passes'}"

    def _note(self, name: str, outcome: str, said: str, seconds: float) -> None:
        with self._lock:
            self._results[outcome].append(name)
            print(f"{outcome:7}  {name}  {seconds:.1f} s{f': {said}' if said else ''}", flush=True)

    def conclude(self) -> int:
        """Print the sums; the exit status."""
        for name in self._left or ():
            self._note(name, "failed", f"no process could be started for it: {self._unready}", 0.0)
        if self._left is None:
            print(f"no test could be run: {self._unready}")
        print(", ".join(f"{len(names)} {outcome}" for outcome, names in self._results.items()))
        for name in self._results["failed"]:
            print(f"failed: {name}")
        return 1 if self._results["failed"] or not any(self._results.values()) else 0


class Worker:
    """A process that runs tests by name.

    Attributes:
        late: whether it was ended because something took too long.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        share = max(1, (os.cpu_count() or 1) // _workers())
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(HERE), SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={"OMP_NUM_THREADS": str(share), **os.environ, **environment},
            text=True,
        )
        self.late = False

    def ask(self, name: str, seconds: float) -> dict[str, Any] | None:
        """What came of a test; None where the process has ended, or was ended since it took longer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self.read(seconds)

    def read(self, seconds: float) -> dict[str, Any] | None:
        """The next that it says, as `ask`."""
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._end)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line else None

    def _end(self) -> None:
        """Have the process say where it is, and end it."""
        self.late = True
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        self._process.kill()

    def death(self) -> str:
        """How the process ended, with the last lines of what it has printed."""
        code = self._process.wait()
        self._log.seek(0)
        tail = "".join(f"\n  {line}" for line in self._log.read().splitlines()[-LOG_LINES:])
        return ("it took too long and was ended" if self.late else f"its process ended with status {code}") + tail

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


# ---- in a worker ----------------------------------------------------------------------------------------------------


def serve() -> int:
    """Say which tests there are, then run those whose names come in; all else that is printed goes to stderr."""
    faulthandler.register(signal.SIGUSR1)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # the helpers beside the tests; the package
    tests = _tests()

    def say(**what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    from gpu_support import described

    say(tests=list(tests), device=described())
    gc.freeze()  # what modules have made stays: a collection need not look at it
    for line in sys.stdin:
        outcome, said = _run(tests[line.strip()])
        say(outcome=outcome, said=said, usable=_usable())
    return 0


def _tests() -> dict[str, Any]:
    import importlib

    found = {}
    stems = sorted((path.stem for path in HERE.glob("test_*.py")), key=lambda s: (s not in FIRST, s))
    for stem in [*(s for s in FIRST if s in stems), *(s for s in stems if s not in FIRST)]:
        module = importlib.import_module(stem)
        found.update({f"{stem}::{n}": getattr(module, n) for n in vars(module) if n.startswith("test_")})
    return found


def _run(test: Any) -> tuple[str, str]:
    from gpu_support import measured

    measured.clear()
    try:
        test()
    except unittest.SkipTest as skip:
        return "skipped", str(skip)
    except Exception as error:
        return "failed", _told(error)
    return "passed", ", ".join(measured)


def _told(error: Exception) -> str:
    """An error's message and the places of our own that led to it, innermost last."""
    root = str(HERE.parent.parent) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    places = [f"  {f.filename[len(root) :]}:{f.lineno} {f.name}: {f.line}" for f in frames[-OUR_FRAMES:]]
    message = f"{type(error).__name__}: {error}".splitlines()
    if len(message) > MESSAGE_LINES:
        message = [*message[: MESSAGE_LINES // 2], "  ...", *message[-MESSAGE_LINES // 2 :]]
    return "\n" + "\n".join([*message, *places])


def _usable() -> bool:
    """Whether CUDA still works in this process, whose memory other processes want: an illegal access ends it."""
    gc.collect()
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == [SERVE] else main(sys.argv[1:]))
