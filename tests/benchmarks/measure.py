"""Time and memory of a call, for the benchmarks and for tests of memory."""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
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
