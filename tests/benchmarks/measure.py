"""Time and memory of a call, for the benchmarks and for tests of memory."""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def median_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median duration of each of several calls, run in turn so that what else the machine does falls on all of them.

    Args:
        calls: by name; each is run once beforehand.
        repeats: number of measured runs of each.

    Returns:
        seconds, by name.
    """
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            result = call()
            _synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
            del result  # freeing it is not part of the next call
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_process_memory(calls: Mapping[str, Callable[[], Any]]) -> dict[str, int]:
    """Largest number of bytes of memory that this process has during each of several calls, in the order given.

    Linux can start counting anew; elsewhere, it is the largest since the process began.
    """
    peaks = {}
    for name, call in calls.items():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        call()
        peaks[name] = _peak_since_start()
    return peaks


def _peak_since_start() -> int:
    try:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_device_memory(call: Callable[[], Any], device: str) -> int:
    """Largest number of MiB that PyTorch holds on a GPU during a call, weights included; on a CPU, of the process."""
    if torch.device(device).type != "cuda":
        return peak_process_memory({"call": call})["call"] // 2**20
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) // 2**20


def stage_seconds(
    call: Callable[[], Any], stages: Sequence[tuple[str, torch.nn.Module]], repeats: int
) -> dict[str, float]:
    """Median duration of each stage of a call.

    Args:
        call: it runs the modules of the stages, in their order, and no more often.
        stages: names, and the module that is the last to run in each stage; one may end several.
        repeats: number of measured runs, after one that is not.

    Returns:
        seconds, by name; "rest" is what comes after the last.
    """
    ends = []

    def end(*_) -> None:
        _synchronize()
        ends.append(time.perf_counter())

    hooks = [module.register_forward_hook(end) for module in {module for _, module in stages}]
    seconds = {name: [] for name in [*(name for name, _ in stages), "rest"]}
    try:
        for repeat in range(repeats + 1):
            ends.clear()
            end()
            call()
            end()
            if len(ends) != len(seconds) + 1:
                raise ValueError(f"{len(seconds) - 1} stages, but their modules ran {len(ends) - 2} times")
            if repeat > 0:
                for values, start, stop in zip(seconds.values(), ends, ends[1:]):
                    values.append(stop - start)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], Any]) -> int:
    """Largest number of bytes of CPU memory that PyTorch holds at a time during a call, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in allocations:
        held += change
        peak = max(peak, held)
    return peak
