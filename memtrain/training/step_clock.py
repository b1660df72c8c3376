"""Runs a training program, whoever's, and measures its optimizer steps from within; then ends it.

python step_clock.py WANTED (-m MODULE | SCRIPT) [ARGUMENT …], where WANTED is JSON: out, warmup, steps, profile.

It knows nothing of memtrain, so that it runs in any interpreter that has torch. A step is all that happens between
two ends of `Optimizer.step`: loading, forward, backward, clipping, average, logging.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import runpy
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


class StepClock:
    """Counts optimizer steps of this process. It writes what it found to `out` and ends the process.

    Args:
        out: file for the figures.
        warmup: steps before those that are measured.
        steps: that are measured.
        count: one step more, of which floating point operations are counted and, on a GPU, the time that it waits.
    """

    def __init__(self, out: str, warmup: int, steps: int, count: bool):
        self.out, self.warmup, self.steps, self.count = Path(out), warmup, steps, count
        self.seen = 0
        self._stack = contextlib.ExitStack()

    def step_ends(self, *_: Any) -> None:
        """Called whenever an optimizer has made a step."""
        self.seen += 1
        if self.seen == self.warmup:
            self._began = self._now()
        elif self.seen == self.warmup + self.steps:
            ended = self._now()
            self.found = {name: (ended[name] - self._began[name]) / self.steps for name in ended}
            if self.count:
                self._flops = self._stack.enter_context(FlopCounterMode(display=False))
                if torch.cuda.is_available():
                    self._profile = self._stack.enter_context(profile(activities=[ProfilerActivity.CUDA]))
                self._counted_from = time.perf_counter()
                return
            self._end()
        elif self.seen > self.warmup + self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._counted_from
            self._stack.close()
            self.found |= {"flops": self._flops.get_total_flops(), "peak_flops": peak_flops()}
            if torch.cuda.is_available():
                spans = [
                    (event.time_range.start, event.time_range.end)
                    for event in self._profile.events()
                    if event.device_type == torch.autograd.DeviceType.CUDA
                ]
                self.found["waiting"] = 1 - union(spans) / 1e6 / seconds
            self._end()

    def _now(self) -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"wall": time.perf_counter(), "cpu": time.process_time()}

    def _end(self) -> None:
        if torch.cuda.is_available():
            self.found["gpu_bytes"] = torch.cuda.max_memory_allocated()
        self.out.write_text(json.dumps(self.found))
        sys.stdout.flush()
        os._exit(0)  # what programs do at their end is not measured, and takes minutes


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these spans (begin, end) lasts."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def peak_flops() -> float:
    """Floating point operations a second of a large matrix product: in bfloat16 on a GPU, else in float32."""
    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 1024
    matrix = torch.randn(side, side, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if on_gpu else None)
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    best = float("inf")
    for _ in range(4):
        began = clock()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, clock() - began)
    return 2 * side**3 / best


def let_torchvision_in() -> None:
    """Name the operators that torchvision registers something for whatever it was built for: where that is another
    torch, as its wheels for CUDA beside a torch without, its compiled operators are missing, and its transforms work.
    """
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(arguments: list[str]) -> None:
    wanted, *words = arguments
    clock = StepClock(**json.loads(wanted))
    register_optimizer_step_post_hook(clock.step_ends)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
            let_torchvision_in()
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)  # as Python does for a script
        runpy.run_path(words[0], run_name="__main__")
    sys.exit("the program ended before its steps were measured")


if __name__ == "__main__":
    main(sys.argv[1:])
