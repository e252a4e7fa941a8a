"""Run the checks and measurements that need a CUDA GPU: `make gpu`, or `python scripts/gpu.py --parts step cifar`.

Each part runs in its own process with a time limit, and prints its rows as soon as they are available. Checks run
concurrently; measurements run alone, one after another. All rows are written to docs/GPU.json. The exit code is 1 if
any check fails. No network access is needed. `--small` runs everything at a small scale on a CPU, to test this script.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SWIN = "timm/swin_tiny_patch4_window7_224"
Row = dict[str, Any]


class Part:
    """The context of a part: its report, its folder and its scale."""

    def __init__(self, name: str, path: Path, small: bool) -> None:
        self.name, self.path, self.small = name, path, small
        self.folder = path.with_suffix("")
        self.folder.mkdir(exist_ok=True)
        self.device = "cpu" if small else "cuda"

    def row(self, what: str, ok: bool | None = None, **facts: Any) -> None:
        """Report a result immediately; ``ok`` is None for a measurement."""
        with self.path.open("a") as file:
            file.write(json.dumps({"part": self.name, "what": what, "ok": ok, **facts}) + "\n")
        shown = (f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items())
        print(f"{'' if ok is None else 'ok' if ok else 'FAIL':5} {what:<44} {'  '.join(shown)}", flush=True)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments, and return the completed process with its output."""
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def train(self, name: str, *settings: str, steps: int, faults: str = "") -> subprocess.CompletedProcess[str]:
        """Train on digits in a run folder with this name."""
        small = ("data.limit=64", "engine.batch_size=16") if self.small else ()
        return self.run(
            "-m",
            "moa_train.cli.train", f"run_dir={self.folder / name}", f"runtime.device={self.device}", "tracking=quiet",
            "schedule.warmup=0%", f"schedule.duration='{steps} steps'", "engine.eval_every='9999 steps'",
            "engine.save_every='9999 steps'", *small, *settings, MOA_TRAIN_FAULTS=faults,
        )  # fmt: skip

    def rows_of(self, name: str, kind: str = "train") -> list[Row]:
        """Return the rows of a run's metrics.jsonl."""
        path = self.folder / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["kind"] == kind]

    def weights_of(self, name: str) -> str:
        """Return a hash of the weights in a run's newest checkpoint."""
        from safetensors.numpy import load_file

        newest = max((self.folder / name / "checkpoints").glob("step-*"), default=None)
        if newest is None:
            return "no checkpoint"
        tensors = load_file(newest / "model.safetensors")
        return hashlib.sha256(b"".join(tensors[key].tobytes() for key in sorted(tensors))).hexdigest()[:16]

    def at_once(self, function: Callable[[Any], None], cases: list[Any], workers: int = 6) -> None:
        """Run the cases concurrently."""
        with ThreadPoolExecutor(2 if self.small else workers) as pool:
            list(pool.map(function, cases[:2] if self.small else cases))

    def bench(self, *arguments: str, start: Sequence[str] = ("-m", "moa_train.cli.bench"), note: str = "") -> None:
        """Run moa-bench and report the rows of its tables."""
        path = self.folder / f"bench-{time.monotonic_ns()}.json"
        sizes = ["--rounds", "1", "--seconds", "0.01", "--batch", "2", "runtime.device=cpu"] if self.small else []
        done = self.run(*start, *arguments, *sizes, "--json", str(path))
        for table in json.loads(path.read_text())["tables"] if path.exists() else []:
            for row in table["rows"]:
                facts = {key: value for key, value in row.items() if key not in ("what", "values")}
                self.row(row["what"] + note, None, **facts, title=table["title"])
        if done.returncode:
            self.row(" ".join(arguments)[:60] + note, False, output=done.stdout[-1500:])


# --- checks -----------------------------------------------------------------------------------------------------------


def tests(part: Part) -> None:
    """Run the tests that need a GPU."""
    done = part.run("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short")
    summary = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    ok = done.returncode == 0
    if not ok:
        print(done.stdout[-8000:])
    part.row("pytest -m gpu", ok, summary=summary)


def numerics(part: Part) -> None:
    """Compare attention layers and their gradients, eager and compiled, and layer norm with float64."""
    import torch
    from torch.nn import functional as F

    from moa_train.model.layers import LayerNorm, WindowAttention
    from moa_train.model.stages import StagePlan
    from moa_train.schema import ModelConfig

    precisions = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 0.02), "fp16": (torch.float16, 3e-3)}
    for window, side, compiled in ((14, 28, False), (4, 16, False), (14, 20, False), (14, 28, True)):
        torch.manual_seed(0)
        stage = StagePlan(0, (side, side), 64, 1, 2, window, False)
        exact, own = (WindowAttention(stage, ModelConfig()).to(device) for device in ("cpu", part.device))
        own.load_state_dict(exact.state_dict())
        call = torch.compile(own, dynamic=False) if compiled and not part.small else own
        x, weight = torch.randn(2, 4, side, side, 64).unbind()
        (exact.double()(x.double()) * weight.double()).sum().backward()
        for name, (dtype, limit) in precisions.items():
            if part.small and name == "fp16":
                continue
            own.zero_grad()
            with torch.autocast(part.device, dtype, enabled=name != "fp32"):
                out = call(x.to(part.device))
            (out.float() * weight.to(part.device)).sum().backward()
            errors = {
                key: distance(mine.grad, theirs.grad)
                for (key, mine), theirs in zip(own.named_parameters(), exact.parameters(), strict=True)
            }
            worst = max(errors, key=errors.__getitem__)
            what = f"window {window} in a map of {side}, {name}{', compiled' * compiled}"
            part.row(what, errors[worst] < limit, worst=worst, error=errors[worst])
    norm, x = LayerNorm(96).to(part.device), 3 * torch.randn(4096, 96) + 1
    torch.nn.init.normal_(norm.weight, 1, 0.1)
    with torch.autocast(part.device, torch.bfloat16), torch.no_grad():
        out = norm(x.to(part.device))
    error = distance(
        out, F.layer_norm(x.double(), (96,), norm.weight.double().cpu(), norm.bias.double().cpu(), norm.eps)
    )
    part.row("layer norm, bf16", error < 5e-3, error=error)


def distance(own: Any, other: Any) -> float:
    """Return the relative error of a tensor with respect to another one."""
    return float((own.detach().double().cpu() - other.detach()).norm() / other.detach().norm())


def digits(part: Part) -> None:
    """Train for 200 steps with every optimizer and precision, and with both forms of MOA."""
    precisions = ("fp32",) if part.small else ("bf16", "fp16", "fp32")
    cases = [f"{name}-{precision}-paper" for precision in precisions for name in ("muon", "adamw", "nadamw", "sgd")]

    def run(case: str) -> None:
        name, precision, form = case.split("-")
        done = part.train(
            case, f"optim={name.replace('nadamw', 'adamw')}", f"optim.name={name}", f"runtime.precision={precision}",
            f"model.moa.form={form}", "model.moa.reduction=8", steps=8 if part.small else 200,
        )  # fmt: skip
        losses, top1 = part.rows_of(case), [row["top1"] for row in part.rows_of(case, "eval")]
        ok = done.returncode == 0 and bool(top1) and (part.small or (losses[-1]["loss"] < 2.2 and top1[-1] > 25))
        facts = {"loss": losses[-1]["loss"], "top1": top1[-1]} if top1 else {"output": done.stdout[-1500:]}
        part.row(case, ok, **facts)

    part.at_once(run, [*cases, "muon-bf16-published", "adamw-fp32-published"])


def compiled(part: Part) -> None:
    """Train with each mode of compilation; the loss matches the eager run's, except for random drop paths."""
    steps = 8 if part.small else 200

    def run(case: tuple[str, str, str]) -> None:
        mode, checkpointing, purpose = case
        name = "-".join(case)
        settings = [f"runtime.compile={mode}", f"model.checkpointing={checkpointing}", f"runtime.compile_for={purpose}"]
        if purpose == "reduce-overhead":  # gradients of several passes are added in the memory of the CUDA graphs
            batch = 16 if part.small else 64
            settings += [f"engine.batch_size={batch}", f"engine.micro_batch_size={batch // 2}"]
        done = part.train(name, *settings, steps=steps)
        losses = [row["loss"] for row in part.rows_of(name)]
        ok = done.returncode == 0 and bool(losses) and (part.small or losses[-1] < 2.0)
        part.row(
            f"compile={mode}, checkpointing={checkpointing}, compile_for={purpose}",
            ok,
            loss=losses[-1:],
            output="" if ok else done.stdout[-1500:],
        )

    cases = [("false", "false"), ("blocks", "false"), ("blocks", "true"), ("model", "false")]
    graphs = [(mode, "false", "reduce-overhead") for mode in ("blocks", "model")]
    part.at_once(run, [*((*case, "default") for case in cases), *graphs], workers=3)


def exact(part: Part) -> None:
    """Train twice with runtime=exact, and once stopped by SIGTERM and resumed; the weights are bit-identical."""
    steps = 8 if part.small else 60
    settings = ("runtime=exact", "model.drop_path=0.2")
    names = ["first", "second", "stopped"]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(
            lambda name: part.train(name, *settings, steps=steps, faults="step.input=term@5" * (name == "stopped")),
            names,
        ))  # fmt: skip
    hashes = [part.weights_of(name) for name in names]
    same = [result.returncode for result in done] == [0, 0, 75] and hashes[0] == hashes[1]
    part.row("the same run twice", same, hashes=hashes, output="" if same else done[0].stdout[-1500:])
    again = part.train("stopped", "resume=auto", *settings, steps=steps)
    ok = again.returncode == 0 and part.weights_of("stopped") == hashes[0] != hashes[2]
    part.row("stopped by SIGTERM and resumed", ok, output="" if ok else again.stdout[-1500:])


def faults(part: Part) -> None:
    """Make a loss NaN: fp16's scaler handles it; otherwise, the run skips the update, rolls back or aborts."""
    said = {"skip": "Skipped", "rollback": "Rolling back", "abort": "is not finite"}

    def run(case: tuple[str, str]) -> None:
        policy, precision = case
        done = part.train(
            "-".join(case), f"engine.nonfinite={policy}", f"runtime.precision={precision}",
            "engine.save_every='3 steps'", steps=12, faults="step.loss=true@6",
        )  # fmt: skip
        scaler = precision == "fp16"
        ok = done.returncode == (2 if policy == "abort" and not scaler else 0)
        ok = ok and (scaler or said[policy].lower() in done.stdout.lower())
        part.row(f"{policy}, {precision}", ok, code=done.returncode, output="" if ok else done.stdout[-1500:])

    names = ("fp32",) if part.small else ("bf16", "fp16")
    part.at_once(run, [(policy, name) for policy in said for name in names])


def ranks(part: Part) -> None:
    """Train with one rank under torchrun, compiled by blocks."""
    settings = [
        f"run_dir={part.folder / 'ranks'}", f"runtime.device={part.device}", "runtime.compile=blocks", "tracking=quiet",
        f"schedule.duration='{8 if part.small else 100} steps'", "schedule.warmup=0%", "engine.micro_batch_size=32",
    ]  # fmt: skip
    done = part.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "moa_train.cli.train", *settings
    )
    losses = [row["loss"] for row in part.rows_of("ranks")]
    ok = done.returncode == 0 and bool(losses)
    part.row("one rank, two micro-batches", ok, loss=losses[-1:], output="" if ok else done.stdout[-2500:])


def evaluation(part: Part) -> None:
    """Evaluate in fp32 with two batch sizes, with equal counts, and in bf16, whose count may differ a little."""
    done = part.train("evaluated", steps=6 if part.small else 200)
    counts = {}
    for precision, batch in (("fp32", "64"), ("fp32", "33"), ("bf16", "64")):
        output = part.folder / f"{precision}-{batch}.json"
        done = part.run(
            "-m", "moa_train.cli.evaluate", f"ckpt={part.folder / 'evaluated'}", f"device={part.device}",
            f"precision={precision}", f"batch_size={batch}", f"output={output}",
        )  # fmt: skip
        counts[precision, batch] = json.loads(output.read_text())["top1_count"] if output.exists() else -1
    exact = counts["fp32", "64"] == counts["fp32", "33"] >= 0
    part.row(
        "fp32, batches of 64 and 33", exact, count=counts["fp32", "64"], output="" if exact else done.stdout[-800:]
    )
    near = abs(counts["bf16", "64"] - counts["fp32", "64"]) <= 4
    part.row("bf16 against fp32", near, count=counts["bf16", "64"], output="" if near else done.stdout[-800:])


# --- measurements -----------------------------------------------------------------------------------------------------


def step(part: Part) -> None:
    """Measure training steps of MOA-T, eager and compiled, then inference and training interleaved with timm's Swin-T.

    Compiling Swin-T takes longest, so the rows of MOA-T alone are reported before it begins.
    """
    base = ["step", "model=moa_t", "data=imagenet", "--batch", "128", "--rounds", "4"]
    if part.small:
        part.bench(*base, "--precision", "fp32", "data.image_size=56")
        return
    base += ["--precision", "bf16"]
    part.bench(*base, "--mode", "train", "--compile", "off")
    part.bench(*base, "--mode", "train", "--compile", "on")
    part.bench(*base, "--mode", "infer", "--against", SWIN)
    part.bench(*base, "--mode", "train", "--compile", "off", "on", "--against", SWIN)


def batches(part: Part) -> None:
    """Measure the same training steps at other batch sizes."""
    if not part.small:
        base = ["step", "model=moa_t", "data=imagenet", "--precision", "bf16", "--rounds", "4", "--mode", "train"]
        part.bench(*base, "--batch", "64", "256", "--compile", "on")
        part.bench(*base, "--batch", "64", "256", "--against", SWIN)


def cifar(part: Part) -> None:
    """Measure steps of the CIFAR recipe's model, whose attention rows have 16 tokens, with each attention kernel."""
    if part.small:
        return
    base = ["step", "model=moa_b", "data=digits", "--precision", "bf16", "--rounds", "3", "--mode", "train"]
    base += ["--batch", "512", "--seconds", "0.3"]
    for switch in ("off", "on"):
        for long_row, note in ((32, ""), (1, ", kernels for long rows")):
            code = f"from moa_train.model import attention; attention.LONG_ROW = {long_row}; "
            code += "from moa_train.cli.bench import main; main()"
            part.bench(*base, "--compile", switch, start=("-c", code), note=note)


def trainer(part: Part) -> None:
    """Measure the complete trainer with augmentation, copies and logging: MOA-T on digits enlarged to 224 pixels."""
    if part.small:
        return
    for mode, purpose, batch in (
        *(("false", "default", 128), ("blocks", "default", 128)),
        *(("blocks", "default", 32), ("blocks", "reduce-overhead", 32)),
    ):
        name = f"{mode}-{purpose}-{batch}"
        done = part.train(
            name, "model=moa_t", "geometry=large", "augment=imagenet", "data.image_size=224", "optim=adamw",
            f"engine.batch_size={batch}", f"runtime.compile={mode}", f"runtime.compile_for={purpose}",
            "runtime.precision=bf16", "data.val_fraction=0", steps=120,
        )  # fmt: skip
        rows = part.rows_of(name)
        facts = {"images_s": rows[-1]["images_per_second"], "MiB": rows[-1]["memory"] / 2**20} if rows else {}
        part.row(
            f"trainer, compile={mode} for {purpose}, batch {batch}",
            done.returncode == 0,
            **facts,
            output="" if rows else done.stdout[-1500:],
        )


def inputs(part: Part) -> None:
    """Measure the input pipeline: gathering, the copy to the device, augmentation there."""
    part.bench("input", "data=digits", "augment=cifar", "--batch", "512", "--mode", "train", "--rounds", "3")


def kernels(part: Part) -> None:
    """Name the kernels that attention runs in, forward and backward, in training and in evaluation."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from moa_train.model.attention import attend

    for groups, heads, tokens in ((64, 3, 196), (512, 4, 16)):
        shape = (2, heads, tokens, 32) if part.small else (groups, heads, tokens, 32)
        q, k, v = (torch.randn(shape, device=part.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias = torch.randn(heads, tokens, tokens, device=part.device, dtype=torch.bfloat16, requires_grad=True)
        activity = ProfilerActivity.CPU if part.small else ProfilerActivity.CUDA
        for mode in ("train", "evaluate"):
            with profile(activities=[activity]) as trace:
                with torch.set_grad_enabled(mode == "train"):
                    out = attend(q, k, v, bias)
                if mode == "train":
                    out.float().sum().backward()
            names = sorted({event.key[:60] for event in trace.key_averages()})
            part.row(f"{mode}, {tokens} tokens", None, kernels=len(names), names=names)


def layers(part: Part) -> None:
    """Compare the implementations of single layers with alternatives that were not chosen."""
    import torch
    from torch.nn import functional as F

    from moa_train.engine.step import Statistics
    from moa_train.model.registry import create_model
    from moa_train.schema import ModelConfig

    bf16, device = torch.bfloat16, part.device
    for shape in ((2, 8, 8, 96),) if part.small else ((128, 56, 56, 96), (128, 14, 14, 384), (512, 32, 32, 128)):
        x, update, upstream = (torch.randn(shape, device=device, dtype=bf16, requires_grad=True) for _ in range(3))
        weight, bias = torch.ones(2, shape[-1], device=device).unbind()
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        kept = torch.arange(int(0.9 * len(x)) or 1, device=device)

        def norm(
            dtype: torch.dtype, x: Any = x, weight: Any = weight, bias: Any = bias, upstream: Any = upstream
        ) -> None:
            out = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype)).to(bf16)
            torch.autograd.grad(out, (x, weight, bias), upstream)

        def select(x: Any = x, kept: Any = kept, upstream: Any = upstream) -> None:
            some = x.index_select(0, kept) * 1.0
            out = x + some.new_zeros(x.shape).index_add_(0, kept, some, alpha=1.1)
            torch.autograd.grad(out, x, upstream)

        def mask(x: Any = x, update: Any = update, upstream: Any = upstream) -> None:
            keep = (torch.rand(len(x), 1, 1, 1, device=device) < 0.9).to(bf16)
            torch.autograd.grad(torch.addcmul(x, update, keep, value=1.1), (x, update), upstream)

        measure(part, f"layer norm {shape}, fp32", partial(norm, torch.float32))
        measure(part, f"layer norm {shape}, bf16", partial(norm, bf16))
        measure(part, f"stochastic depth {shape}, samples selected", select)
        measure(part, f"stochastic depth {shape}, masked", mask)
    for heads, side in ((3, 14), (12, 14), (16, 4)):
        gather(part, heads, side)
    resnet = ModelConfig(name="resnet", depths=[3, 4, 6, 3], embed_dim=64, drop_path=0.0)
    statistics = Statistics(create_model(resnet, image_size=(64, 64), num_classes=5).to(device))
    measure(part, "statistics of ResNet-50 saved", statistics.save)
    measure(part, "statistics of ResNet-50 restored", partial(statistics.restore, torch.ones((), device=device)))


def gather(part: Part, heads: int, side: int) -> None:
    """Measure a lookup in the position table, including its gradient."""
    import torch

    from moa_train.model.attention import relative_position_index

    table = torch.randn((2 * side - 1) ** 2, heads, device=part.device, requires_grad=True)
    index = relative_position_index(side, side).to(part.device).view(-1)
    upstream = torch.randn(heads, side**4, device=part.device)
    for dtype in (torch.bfloat16, torch.float32):

        def look_up(dtype: torch.dtype = dtype) -> None:
            out = table.to(dtype).t().index_select(1, index).to(torch.bfloat16)
            torch.autograd.grad(out, table, upstream.to(torch.bfloat16))

        measure(part, f"position table, {heads} heads, window {side}, {dtype}", look_up)


def augmentation(part: Part) -> None:
    """Measure augmentation on the device: erasing all images at once, and the recipe's full augmentation."""
    import numpy as np
    import torch

    from moa_train.data.augment import BatchAugment, Normalize
    from moa_train.data.counter import sample_keys
    from moa_train.data.erasing import RandomErasing
    from moa_train.interfaces import Batch
    from moa_train.schema import AugmentConfig, DataConfig

    for count, side in ((2, 16),) if part.small else ((128, 224), (512, 32)):
        images, keys = torch.randn(count, 3, side, side, device=part.device), sample_keys(0, 0, np.arange(count), 0)
        measure(part, f"erasing, {count} images of {side}", partial(RandomErasing(0.25), images, keys))
        config = AugmentConfig(crop="none", randaugment_ops=2, erasing=0.25)
        augment = BatchAugment(config, crop="none", seed=0, normalize=Normalize.of(DataConfig()))
        numbers, pixels = torch.arange(count), torch.randint(0, 256, images.shape, dtype=torch.uint8)
        batch = Batch(pixels.to(part.device), numbers.to(part.device), numbers, numbers, numbers, 0)
        measure(part, f"the recipe, {count} images of {side}", partial(augment, batch))


def measure(part: Part, what: str, function: Callable[[], object]) -> None:
    """Report the time of a call, and the total time and the number of its kernels."""
    import torch

    from moa_train.bench.timing import alternate, timed

    device = torch.device(part.device)
    taken = alternate({what: timed(function, device, least_seconds=0.001 if part.small else 0.05)}, 3)[what]
    facts: Row = {"ms": 1e3 * sorted(taken)[1], "least": 1e3 * min(taken), "most": 1e3 * max(taken)}
    if not part.small:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            function()
            torch.cuda.synchronize()
        kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        facts |= {"gpu_ms": sum(event.self_device_time_total for event in kernels) / 1e3, "kernels": len(kernels)}
    part.row(what, None, **facts)


CHECKS = (tests, numerics, digits, compiled, exact, faults, ranks, evaluation)
MEASUREMENTS = (step, batches, cifar, trainer, inputs, kernels, layers, augmentation)
PARTS: dict[str, Callable[[Part], None]] = {function.__name__: function for function in (*CHECKS, *MEASUREMENTS)}


# --- running the parts ------------------------------------------------------------------------------------------------


def run_part(name: str, limit: float, folder: Path, small: bool, label: str = "") -> list[Row]:
    """Run one part in its own process group, show its output, and return its rows."""
    path = folder / f"{name}{label}.jsonl"
    command = [sys.executable, __file__, "--run", name, str(path), *["--small"] * small]
    start, late = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if not label:
            print(f"{name:<12} {line.rstrip()[:300]}", flush=True)
    code = process.wait()
    timer.cancel()
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if late.is_set() or code or (not rows and not small):
        what = f"not finished within {limit:.0f} s" if late.is_set() else f"exit code {code}, {len(rows)} rows"
        rows.append({"part": name, "what": what, "ok": False})
    print(f"{name + label:<12} took {time.monotonic() - start:.0f} s", flush=True)
    return rows


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all, in this order"
    )
    parser.add_argument(
        "--warm",
        nargs="+",
        choices=list(PARTS),
        default=[],
        help="parts to run during the checks, only to fill the compiler caches",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="output folder for GPU.json (default: docs)")
    parser.add_argument("--limit", type=float, default=600.0, help="time limit for each part in seconds (default: 600)")
    parser.add_argument(
        "--budget", type=float, default=7200.0, help="time limit for all parts together in seconds (default: 7200)"
    )
    parser.add_argument("--small", action="store_true", help="run everything at a small scale on a CPU")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if options.run:
        name, path = options.run
        PARTS[name](Part(name, Path(path), options.small))
        return 0
    start, rows = time.monotonic(), list[Row]()
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(found: list[Row]) -> None:
        rows.extend(found)
        (options.out / "GPU.json").write_text(
            json.dumps({"runs": [{**header(options.small), "rows": rows}]}, indent=1) + "\n"
        )

    def left() -> float:
        return min(options.limit, options.budget - (time.monotonic() - start))

    with tempfile.TemporaryDirectory() as folder:
        run = partial(run_part, folder=Path(folder), small=options.small)
        checks = [name for name in options.parts if PARTS[name] in CHECKS]
        with ThreadPoolExecutor(max(1, len(checks) + len(options.warm))) as pool:
            warm = [pool.submit(run, name, left(), label=", warming up") for name in options.warm]
            for found in pool.map(lambda name: run(name, left()), checks):
                keep(found)
        assert all(future.done() for future in warm)
        for name in options.parts:
            if PARTS[name] in MEASUREMENTS:
                keep(run(name, left()) if left() > 5 else [{"part": name, "what": "no time left", "ok": False}])
    wrong = [row for row in rows if row["ok"] is False]
    print(f"\n{len(rows)} rows, {len(wrong)} failed, {time.monotonic() - start:.0f} s")
    for row in wrong:
        print(f"  FAIL {row['part']}: {row['what']}")
    return 1 if wrong else 0


def header(small: bool) -> Row:
    """Return a description of the machine and the software."""
    import torch

    from moa_train.bench import tables

    return tables.header(torch.device("cpu" if small else "cuda"), sys.orig_argv)


if __name__ == "__main__":
    sys.exit(main())
