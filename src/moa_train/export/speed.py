"""Compare the speed of two ONNX files, and explain it by profiles."""

import contextlib
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moa_train.export import onnx_file

SECONDS = 0.05
"""Minimum duration of one measurement."""


def repeated(examples: NDArray[np.uint8], batch_size: int) -> NDArray[np.uint8]:
    """Return a batch of this size, of repeated examples."""
    return np.resize(examples, (batch_size, *examples.shape[1:]))


def compare(fp32: Any, int8: Any, examples: NDArray[np.uint8], batch_size: int, rounds: int) -> dict[str, Any]:
    """Time two sessions alternately, and return medians and the ratio with its quartiles."""
    images, sessions = repeated(examples, batch_size), {"fp32": fp32, "int8": int8}
    calls = {}
    for name, session in sessions.items():
        seconds(session, images, 1)  # warm up
        calls[name] = max(1, math.ceil(SECONDS / seconds(session, images, 1)))
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            taken[name].append(seconds(session, images, calls[name]))
    ratios = [slow / fast for slow, fast in zip(taken["fp32"], taken["int8"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "fp32_ms": 1e3 * statistics.median(taken["fp32"]),
        "int8_ms": 1e3 * statistics.median(taken["int8"]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def seconds(session: Any, images: NDArray[np.uint8], calls: int) -> float:
    """Return the seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        session.run(["logits"], {"images": images})
    return (time.perf_counter() - start) / calls


def cpu() -> dict[str, Any]:
    """Return the name of the CPU, and which of the instructions for products of 8-bit numbers it has."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", "").split()
    known = [flag for flag in ("avx_vnni", "avx512_vnni", "amx_int8") if flag in flags]
    return {"name": found.get("model name", "unknown"), "int8_instructions": known}


def reason(model: Any, images: NDArray[np.uint8]) -> str:
    """Explain from a profile of an int8 model (``onnx.ModelProto``) what its time is spent on."""
    times, instructions = profile(model, images), cpu()["int8_instructions"]
    total = sum(times.values())
    integer = sum(value for name, value in times.items() if name in INTEGER)
    others = [f"{name} {100 * value / total:.0f}%" for name, value in times.most_common() if name not in INTEGER]
    has = f"has {', '.join(instructions)}" if instructions else "has no instructions for products of 8-bit numbers"
    return (
        f"this CPU {has}, and the int8 file spends {100 * integer / total:.0f}% of its time in int8 kernels; the rest "
        f"is {', '.join(others[:5])}"
    )


INTEGER = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
"""ONNX Runtime's kernels for products of 8-bit numbers."""


def profile(model: Any, images: NDArray[np.uint8], runs: int = 20) -> Counter[str]:
    """Return the microseconds that a model spends in each kind of kernel: sums over nodes of medians over runs."""
    with TemporaryDirectory() as folder:
        opened = onnx_file.session(model.SerializeToString(), profile=Path(folder) / "profile")
        for _ in range(runs):
            opened.run(["logits"], {"images": images})
        events = json.loads(Path(opened.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"])
    times: Counter[str] = Counter()
    for (kind, _), durations in nodes.items():
        times[kind] += round(statistics.median(durations))
    return times
