"""What a computation costs: time, floating-point operations, memory kept for the backward pass, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, forward and backward.

    A product of (m, k) and (k, n) matrices counts 2·m·k·n. The same on every machine, whatever it is busy with.

    Args:
        run: The computation.
    """
    counter = FlopCounterMode(display=False)
    # Its hooks on modules fail where one returns a parameter under no_grad, as prompts do.
    counter.mod_tracker = _Everywhere()
    with counter:
        run()
    return counter.get_total_flops()


class _Everywhere(contextlib.nullcontext):
    """A module tracker that counts everything under one name."""

    parents = frozenset({"Global"})


def count_saved_bytes(run: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass.

    Each piece of memory counts once, however many operations keep it; parameters and buffers do not count.

    Args:
        run: The forward pass; what it returns is kept until all is counted.
        model: Whose parameters and buffers do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Without its graph: an operation that kept its own output this way would keep itself alive for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # alive until here, so that no address is given away twice
    del result
    return sum(kept.values())


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Bytes by which memory grew at most while something ran.

    On CUDA what PyTorch's allocator handed out; on the CPU the resident memory of this process, under Linux, and None
    elsewhere.

    Args:
        run: The computation.
        device: Where it runs.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    # Large blocks always from, and back to, the system: freed memory that the C library keeps would hide growth.
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory so far is forgotten
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def interleaved_seconds(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of several computations, measured in turn, so that a slow moment of the machine hits all of them.

    Args:
        runs: The computations by name.
        repeats: Measurements of each.
        warmup: Rounds before the first measurement.
        device: Where they run.
        clock: `"wall"`, or `"processor"`: time that the threads of this process worked, all together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        # In another order each time: what always came right after the same other one would meet its leavings in the
        # caches. The same order in all processes.
        for name, run in random.Random(repeat).sample(list(runs.items()), len(runs)):
            elapsed = _time(run, device, CLOCKS[clock])
            if repeat >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _time(run: Callable[[], Any], device: torch.device | str, now: Callable[[], float]) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the slowest process begins, and all of them end with the average of gradients
    wait()
    start = now()
    run()
    wait()
    return now() - start
