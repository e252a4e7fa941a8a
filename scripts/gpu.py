"""Show on a CUDA machine what can't be shown without one: `make gpu`, or `python scripts/gpu.py --parts step compiled`.

Each part runs in a process of its own with a time limit, prints its rows as soon as they are there, and is recorded in
GPU.json. Parts that check numbers run at the same time; parts that take times run alone, one after another. The exit
code is 1 if any row or part failed. `--small` runs everything in small on a CPU, to test this script itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Part = Callable[["Report", "Scale"], None]
CHECKS: dict[str, tuple[int, Part]] = {}
TIMES: dict[str, tuple[int, Part]] = {}


class Report:
    """Rows of one part, printed and kept at once."""

    def __init__(self, part: str, path: Path) -> None:
        self.part, self.path = part, path

    def row(self, what: str, ok: bool | None = None, **facts: Any) -> None:
        """Report one result; ``ok`` is None where nothing is asserted."""
        row = {"part": self.part, "what": what, "ok": ok, **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(
            f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        print(f"{ {True: 'ok', False: 'WRONG', None: '  '}[ok]:5} {what:<44} {shown}", flush=True)


class Scale:
    """How large everything is: full on a GPU, or small on a CPU."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.device = "cpu" if small else "cuda"
        self.steps = 6 if small else 200

    def train(self, folder: Path, *arguments: str, faults: str = "") -> subprocess.CompletedProcess[str]:
        """Run moa-train on digits."""
        limit = ["data.limit=64", "engine.batch_size=16"] if self.small else []
        return subprocess.run(
            [sys.executable, "-m", "moa_train.cli.train", "tracking=quiet", f"runtime.device={self.device}"]
            + ["schedule.warmup=0%"] + limit + [f"run_dir={folder}", *arguments],
            capture_output=True, text=True, check=False,
            env={**os.environ, "MOA_TRAIN_FAULTS": faults, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def part(table: dict[str, tuple[int, Part]], limit: int) -> Callable[[Part], Part]:
    """Register a function as a part with a limit in seconds."""

    def register(function: Part) -> Part:
        table[function.__name__] = limit, function
        return function

    return register


# --- checks -------------------------------------------------------------------------------------------------------


@part(CHECKS, 75)
def tests(report: Report, scale: Scale) -> None:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode not in ((0, 5) if scale.small else (0,)):
        print("\n".join(lines[-120:]))
    report.row("pytest -m gpu", done.returncode == 0 or (scale.small and "skipped" in lines[-1]), summary=lines[-1])


@part(CHECKS, 60)
def numerics(report: Report, scale: Scale) -> None:
    """Compare layers and their gradients with float64."""
    import torch

    from moa_train.model.layers import LayerNorm, WindowAttention

    torch.manual_seed(0)
    for tokens_side, map_side in ((14, 28), (4, 16), (2, 8), (14, 20)):
        dim, heads = 64, 2
        own = WindowAttention(dim, heads, (map_side, map_side), tokens_side, 0.0).to(scale.device)
        exact = WindowAttention(dim, heads, (map_side, map_side), tokens_side, 0.0).double()
        exact.load_state_dict(own.state_dict())
        x = torch.randn(4, map_side, map_side, dim)
        weight = torch.randn_like(x)
        (exact(x.double()) * weight.double()).sum().backward()
        wanted = {name: p.grad for name, p in exact.named_parameters()}
        for name, limit in (("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 3e-3)):
            if scale.small and name == "fp16":
                continue
            own.zero_grad()
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
            with torch.autocast(scale.device, dtype, enabled=name != "fp32"):
                out = own(x.to(scale.device))
            (out.float() * weight.to(scale.device)).sum().backward()
            errors = {
                key: float((p.grad.double().cpu() - wanted[key]).norm() / wanted[key].norm())
                for key, p in own.named_parameters()
            }
            worst = max(errors, key=errors.__getitem__)
            report.row(
                f"window {tokens_side} of {map_side}, {name}", errors[worst] < limit, worst=worst, error=errors[worst],
                table=errors["relative_position_bias_table"],
            )  # fmt: skip
    norm, x = LayerNorm(96).to(scale.device), torch.randn(4096, 96) * 3 + 1
    torch.nn.init.normal_(norm.weight, 1, 0.1)
    expected = torch.nn.functional.layer_norm(
        x.double(), (96,), norm.weight.double().cpu(), norm.bias.double().cpu(), norm.eps
    )
    with torch.autocast(scale.device, torch.bfloat16):
        error = float((norm(x.to(scale.device)).double().cpu() - expected).detach().norm() / expected.norm())
    report.row("LayerNorm in bf16", error < 5e-3, error=error)


@part(CHECKS, 110)
def digits(report: Report, scale: Scale) -> None:
    """Train on digits with every optimizer and precision, and with both forms of MOA."""
    precisions = ("fp32",) if scale.small else ("bf16", "fp16", "fp32")
    cases = [(name, precision, "paper") for precision in precisions for name in ("muon", "adamw", "nadamw", "sgd")]
    cases += [("muon", precisions[0], "released"), ("adamw", precisions[-1], "released")]

    def run(case: tuple[str, str, str]) -> None:
        name, precision, form = case
        folder = report.path.parent / "runs" / "-".join(case)
        shape = ["model.window=4", "model.moa.reduction=8"] if form == "released" else []
        done = scale.train(
            folder, f"optim={name.replace('nadamw', 'adamw')}", f"optim.name={name}", f"runtime.precision={precision}", f"model.moa.form={form}", *shape,
            f"schedule.duration='{scale.steps} steps'", "engine.eval_every='1000 steps'",
            "engine.save_every='1000 steps'",
        )  # fmt: skip
        rows = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            if not done.returncode
            else []
        )
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        top1 = [row["top1"] for row in rows if row.get("split") == "test"]
        ok = bool(losses) and (scale.small or (losses[-1] < 2.2 and top1[-1] > 25))
        speed = [row["images_per_second"] for row in rows if row["kind"] == "train"][-1:]
        facts = (
            {"loss": losses[-1], "top1": top1[-1], "speed": speed[0]}
            if losses
            else {"error": (done.stdout + done.stderr)[-1500:]}
        )
        report.row(" ".join(case), ok, **facts)

    with ThreadPoolExecutor(2 if scale.small else 7) as pool:
        list(pool.map(run, cases))


def weights_of(folder: Path) -> str:
    """Return a hash of the newest checkpoint's weights."""
    import hashlib

    from safetensors.numpy import load_file

    newest = max((folder / "checkpoints").glob("step-*"), default=None)
    if newest is None:
        return "nothing"
    tensors = load_file(newest / "model.safetensors")
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()[:16]


@part(CHECKS, 110)
def exact(report: Report, scale: Scale) -> None:
    """Train twice with runtime=exact, and once stopped by SIGTERM and resumed: the same bits."""
    steps = 8 if scale.small else 60
    common = ("runtime=exact", "model.drop_path=0.2", f"schedule.duration='{steps} steps'", "engine.save_every='1000 steps'",
              "engine.eval_every='1000 steps'")  # fmt: skip
    folders = [report.path.parent / "runs" / name for name in ("exact-1", "exact-2", "stopped")]

    def run(number: int) -> tuple[int, str]:
        faults = f"step.input=term@{steps // 2}" if number == 2 else ""
        done = scale.train(folders[number], *common, faults=faults)
        return done.returncode, (done.stdout + done.stderr)[-1500:]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    hashes = [weights_of(folder) for folder in folders]
    same = hashes[0] == hashes[1] != "nothing"
    report.row("the same run twice", same, hashes=hashes[:2], **({} if same else {"output": results[0][1]}))
    done = scale.train(folders[2], "resume=auto", *common)
    again = weights_of(folders[2])
    ok = results[2][0] == 75 and done.returncode == 0 and again == hashes[0]
    report.row("stopped by SIGTERM and resumed", ok, code=results[2][0], hash=again, resumed=hashes[2] != again,
               **({} if ok else {"output": results[2][1] + done.stdout[-800:] + done.stderr[-800:]}))  # fmt: skip


@part(CHECKS, 110)
def faults(report: Report, scale: Scale) -> None:
    """Let a gradient be infinite: the update is skipped, or the run rolled back."""
    steps = 8 if scale.small else 40

    def run(case: tuple[str, str]) -> None:
        policy, precision = case
        folder = report.path.parent / "runs" / "-".join(case)
        done = scale.train(
            folder, f"engine.nonfinite={policy}", f"runtime.precision={precision}", f"schedule.duration='{steps} steps'",
            "engine.save_every='3 steps'", "engine.eval_every='1000 steps'", faults=f"step.loss=true@{steps // 2}",
        )  # fmt: skip
        if precision == "fp16":  # it's the scale's fault, and the scaler's business
            policy = "scaler"
        said = {
            "scaler": "done",
            "skip": "Skipped, 1 of at most",
            "rollback": "Rolling back",
            "abort": "is not finite",
        }[policy]
        ok = done.returncode == (2 if policy == "abort" else 0) and said in done.stdout + done.stderr
        report.row(f"{case[0]}, {precision}", ok, code=done.returncode,
                   **({} if ok else {"output": (done.stdout + done.stderr)[-1500:]}))  # fmt: skip

    cases = [
        (policy, "fp32" if scale.small else name)
        for policy in ("skip", "rollback", "abort")
        for name in ("bf16", "fp16")
    ]
    with ThreadPoolExecutor(2 if scale.small else 6) as pool:
        list(pool.map(run, cases[:: 2 if scale.small else 1]))


# --- times --------------------------------------------------------------------------------------------------------


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    if not scale.small:
        import torch

        torch.cuda.synchronize()


def seconds(
    function: Callable[[], object], scale: Scale, least: float = 0.25, rounds: int = 3
) -> tuple[float, float, float]:
    """Return the median, least and most seconds of a call, each round at least ``least`` seconds long."""
    for _ in range(3):
        function()
    synchronize(scale)
    start = time.perf_counter()
    function()
    synchronize(scale)
    calls = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    if scale.small:
        calls = 1
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(scale)
        taken.append((time.perf_counter() - start) / calls)
    taken.sort()
    return taken[len(taken) // 2], taken[0], taken[-1]


def kernels(function: Callable[[], object], scale: Scale, top: int = 0) -> dict[str, Any]:
    """Return how long the device computes in a call, in ms, and with how many kernels."""
    if scale.small:
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize(scale)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        synchronize(scale)
    found = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    facts = {"gpu_ms": sum(event.self_device_time_total for event in found) / 1e3, "kernels": len(found)}
    if top:
        by_name: dict[str, list[float]] = {}
        for event in found:
            by_name.setdefault(event.name, []).append(event.self_device_time_total / 1e3)
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]
        facts["top"] = [(round(sum(times), 3), len(times), name[:110]) for name, times in longest]
    return facts


@part(TIMES, 75)
def attention(report: Report, scale: Scale) -> None:
    """Time kernels of attention with a learned bias, forward and backward, and their gradients' errors."""
    import torch
    import torch.nn.functional as F

    from moa_train.model.attention import aligned

    def fused(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, aligned(bias[None]))

    def plain(q: Any, k: Any, v: Any, bias: Any) -> Any:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores + bias).softmax(-1) @ v

    def softmax(scores: Any, bias: Any) -> Any:
        return (scores.float() + bias.float()).softmax(-1).to(scores.dtype)

    ways: dict[str, Callable[..., Any]] = {"fused": fused, "plain": plain}
    if not scale.small:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(softmax, dynamic=False)
        ways["plain, softmax compiled"] = lambda q, k, v, bias: compiled((q * q.shape[-1] ** -0.5) @ k.mT, bias) @ v

        def flexible(q: Any, k: Any, v: Any, bias: Any) -> Any:
            bias = bias.float()  # its gradient is added up in its dtype
            return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[h, i, j])

        ways["flex"] = torch.compile(flexible, dynamic=False)
        ways["fused, bias without gradient"] = lambda q, k, v, bias: fused(q, k, v, bias.detach())
        from window_attention import Attend

        ways["triton"] = Attend.apply
    shapes = {"MOA-T stage 1": (2048, 3, 196), "MOA-T stage 2": (512, 6, 196), "MOA-T stage 3": (128, 12, 196),
              "MOA-B 32 stage 1": (32768, 4, 16), "MOA-B 32 stage 3": (2048, 16, 16), "MOA-T MOA 1": (128, 3, 16)}  # fmt: skip
    torch.manual_seed(0)
    for name, (groups, heads, tokens) in shapes.items():
        if scale.small:
            groups = 2
        dtype = torch.bfloat16
        q, k, v = (
            torch.randn(groups, heads, tokens, 32, device=scale.device, dtype=dtype, requires_grad=True)
            for _ in range(3)
        )
        bias = torch.randn(heads, tokens, tokens, device=scale.device, requires_grad=True)
        upstream = torch.randn_like(q)
        small = [
            value.detach().double()[: 4 if value is not bias else None].requires_grad_() for value in (q, k, v, bias)
        ]
        wanted = torch.autograd.grad((plain(*small) * upstream[:4].double()).sum(), small)
        for way, function in ways.items():
            try:
                few = [value.detach()[:4].requires_grad_() for value in (q, k, v)] + [bias]
                got = torch.autograd.grad(function(*few[:3], bias.to(dtype)), few, upstream[:4], allow_unused=True)
                errors = [
                    float((own.double() - other).norm() / other.norm()) if own is not None else 0.0
                    for own, other in zip(got, wanted, strict=True)
                ]

                def both(function: Any = function) -> None:
                    out = function(q, k, v, bias.to(dtype))
                    torch.autograd.grad(out, (q, k, v, bias), upstream, allow_unused=True)

                def forward(function: Any = function) -> None:
                    with torch.no_grad():
                        function(q, k, v, bias.to(dtype))

                whole, ahead = seconds(both, scale, 0.02), seconds(forward, scale, 0.01)
                report.row(f"{name}: {way}", errors[0] < 0.02 and errors[3] < 0.02, ms=1e3 * whole[0],
                           forward_ms=1e3 * ahead[0], q_error=errors[0], bias_error=errors[3], **kernels(both, scale))  # fmt: skip
            except Exception as error:
                report.row(f"{name}: {way}", False, error=repr(error)[:600])


@part(TIMES, 45)
def layers(report: Report, scale: Scale) -> None:
    """Time single layers, the old way and the new way: layer norm, stochastic depth, position table, casts."""
    import torch
    import torch.nn.functional as F

    device, bf16 = scale.device, torch.bfloat16
    torch.manual_seed(0)

    def compare(what: str, ways: dict[str, Callable[[], object]]) -> None:
        for way, function in ways.items():
            try:
                median, least, most = seconds(function, scale, 0.03)
                report.row(
                    f"{what}: {way}",
                    None,
                    ms=1e3 * median,
                    least=1e3 * least,
                    most=1e3 * most,
                    **kernels(function, scale),
                )
            except Exception as error:
                report.row(f"{what}: {way}", False, error=repr(error)[:600])

    for shape in ((128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (512, 32, 32, 128)):
        if scale.small:
            shape = (2, 8, 8, shape[-1])
        x, weight = (
            torch.randn(shape, device=device, dtype=bf16, requires_grad=True),
            torch.ones(shape[-1], device=device, requires_grad=True),
        )
        bias, upstream = torch.zeros_like(weight, requires_grad=True), torch.randn(shape, device=device, dtype=bf16)

        def old_norm(x: Any = x, weight: Any = weight, bias: Any = bias, upstream: Any = upstream) -> None:
            out = F.layer_norm(x.float(), x.shape[-1:], weight, bias).to(bf16)
            torch.autograd.grad(out, (x, weight, bias), upstream)

        def new_norm(x: Any = x, weight: Any = weight, bias: Any = bias, upstream: Any = upstream) -> None:
            out = F.layer_norm(x, x.shape[-1:], weight.to(bf16), bias.to(bf16))
            torch.autograd.grad(out, (x, weight, bias), upstream)

        def fused_norm(x: Any = x, weight: Any = weight, bias: Any = bias, upstream: Any = upstream) -> None:
            out = compiled_norm(x, weight, bias)
            torch.autograd.grad(out, (x, weight, bias), upstream)

        def norm(x: Any, weight: Any, bias: Any) -> Any:
            return F.layer_norm(x.float(), x.shape[-1:], weight, bias).to(bf16)

        compiled_norm = torch.compile(norm, dynamic=False)
        ways: dict[str, Callable[[], object]] = {"fp32": old_norm, "bf16": new_norm}
        compare(f"layer norm {shape}", ways if scale.small else {**ways, "compiled": fused_norm})

        update = torch.randn(shape, device=device, dtype=bf16, requires_grad=True)
        B = shape[0]
        kept = torch.arange(int(0.9 * B), device=device)

        def select(x: Any = x, upstream: Any = upstream) -> None:
            part = x.index_select(0, kept) * 1.0
            out = x + part.new_zeros(x.shape).index_add_(0, kept, part, alpha=1.1)
            torch.autograd.grad(out, x, upstream)

        def mask(x: Any = x, update: Any = update, upstream: Any = upstream) -> None:
            out = torch.addcmul(x, update, (torch.rand(B, 1, 1, 1, device=device) < 0.9).to(bf16), value=1.1)
            torch.autograd.grad(out, (x, update), upstream)

        def nothing(x: Any = x, update: Any = update, upstream: Any = upstream) -> None:
            torch.autograd.grad(x + update, (x, update), upstream)

        compare(f"stochastic depth {shape}", {"select": select, "mask": mask, "none": nothing})

    for heads, side in ((3, 14), (12, 14), (16, 4)):
        table = torch.randn(2 * side - 1, 2 * side - 1, heads, device=device, requires_grad=True)
        index = relative_index(side).to(device).view(-1)
        upstream = torch.randn(heads, side**2, side**2, device=device, dtype=bf16)

        def gathered(first: Any, table: Any = table, index: Any = index, upstream: Any = upstream) -> None:
            out = table.to(first).view(-1, table.shape[2]).t().index_select(1, index).view(upstream.shape).to(bf16)
            torch.autograd.grad(out, table, upstream)

        def unfolded(table: Any = table, side: int = side, upstream: Any = upstream) -> None:
            out = (
                table.unfold(0, side, 1)
                .unfold(1, side, 1)
                .flip(3, 4)
                .permute(2, 0, 1, 3, 4)
                .reshape(upstream.shape)
                .to(bf16)
            )
            torch.autograd.grad(out, table, upstream)

        ways = {
            "bf16 gather": lambda: gathered(bf16),
            "fp32 gather": lambda: gathered(torch.float32),
            "fp32 unfold": unfolded,
        }
        compare(f"position table {heads} heads, window {side}", ways)

    x, weight = (
        torch.randn(128 * 56 * 56, 96, device=device, dtype=bf16),
        torch.randn(384, 96, device=device, dtype=bf16),
    )
    if not scale.small:
        ones = torch.ones(1, len(x), device=device, dtype=bf16)
        biasless = {"linear without bias": lambda: F.linear(x, weight)}
        grad = torch.randn(len(x), 384, device=device, dtype=bf16)
        compare("fc1 of stage 1", {**biasless, "bias gradient by sum": lambda: grad.sum(0),
                                   "bias gradient by product": lambda: ones @ grad})  # fmt: skip


def relative_index(side: int) -> Any:
    """Return the index of the position table."""
    from moa_train.model.attention import relative_position_index

    return relative_position_index(side, side)


@contextmanager
def composed(*overrides: str) -> Iterator[Any]:
    """Compose a configuration as moa-train would."""
    import hydra
    from hydra.core.config_store import ConfigStore

    from moa_train.cli import app
    from moa_train.schema import RunConfig

    ConfigStore.instance().store(name="train_schema", node=RunConfig)
    ConfigStore.instance().store(group="hydra/help", name="train_help", node=app._help(RunConfig, ""))
    with hydra.initialize_config_module("moa_train.conf", version_base="1.3"):
        yield app.typed(hydra.compose("train", list(overrides)))


def old_code() -> None:
    """Put the code of 2026-11-24 in the place of what is new, to compare with."""
    import torch

    from moa_train.model import layers
    from moa_train.model.attention import BiasedAttention

    old_norms()

    def position_bias(self: Any, like: Any) -> Any:
        table_NR = self.relative_position_bias_table.to(like.dtype).view(-1, self.heads).t()
        L = self.relative_position_index.shape[0]
        return table_NR.index_select(1, self.relative_position_index.view(-1)).view(self.heads, L, L)

    BiasedAttention.position_bias = position_bias  # type: ignore[method-assign]
    select_samples()
    assert layers, torch


def old_norms() -> None:
    """Compute layer norms in fp32."""
    from torch import nn

    from moa_train.model import layers

    layers.LayerNorm.forward = nn.LayerNorm.forward  # type: ignore[method-assign]


def select_samples() -> None:
    """Compute only the samples that keep a branch."""
    import torch

    from moa_train.model import layers
    from moa_train.runtime.device import to_device

    def forward(self: Any, branch: Any, x: Any) -> Any:
        if not self.training or self.rate == 0.0:
            return branch(x)
        B, keep = x.shape[0], 1.0 - self.rate
        kept = torch.rand(B).lt(keep).nonzero().flatten()
        if len(kept) in (0, B):
            return branch(x) / keep
        kept = to_device(kept, x.device)
        update = branch(x.index_select(0, kept))
        return update.new_zeros(B, *update.shape[1:]).index_add(0, kept, update, alpha=1 / keep)

    layers.DropPath.forward = forward  # type: ignore[method-assign]
    layers.DropPath.add = lambda self, branch, x: x + self(branch, x)  # type: ignore[method-assign]


def plain_attention() -> None:
    """Use products and a softmax in place of the fused kernel, with scores in fp32 for the softmax."""
    import torch

    from moa_train.model import attention, layers, moa

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        with torch.autocast("cuda", enabled=False):
            scores = (q.contiguous() * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            if torch.compiler.is_compiling():
                return (scores.float() + bias.float()).softmax(-1).to(v.dtype) @ v
            return scores.add_(bias).softmax(-1) @ v

    attention.attend = layers.attend = moa.attend = attend


def flex_attention() -> None:
    """Use flex_attention."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    from moa_train.model import attention, layers, moa

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        bias = bias.float()
        return flex(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[h, i, j])

    attention.attend = layers.attend = moa.attend = attend


def cast_blocks() -> None:
    """Cast all weights of a block at once."""
    import torch
    from torch.func import functional_call

    from moa_train.model import layers

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *parameters: Any) -> Any:
            copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in parameters]
            torch._foreach_copy_(copies, list(parameters))
            return tuple(copies)

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            full = [torch.empty_like(g, dtype=torch.float32) for g in gradients]
            torch._foreach_copy_(full, list(gradients))
            return tuple(full)

    def run_block(block: Any, x: Any, *, recompute: bool) -> Any:
        if not isinstance(block, torch.nn.Module):
            return block(x)
        named = {name: p for name, p in block.named_parameters() if "table" not in name}
        return functional_call(block, dict(zip(named, Cast.apply(*named.values()), strict=True)), (x,))

    layers.run_block = run_block


def compile_blocks(model: Any, **options: Any) -> None:
    """Compile every class of block once."""
    from types import MethodType

    import torch

    from moa_train.model import layers, moa

    torch._dynamo.config.recompile_limit = 64
    for kind in (layers.LocalBlock, moa.MOABlock, layers.PatchMerging, layers.PatchEmbedding):
        compiled = torch.compile(kind.forward, dynamic=False, **options)
        for module in model.modules():
            if type(module) is kind:
                module.forward = MethodType(compiled, module)


def step_of(scale: Scale, variant: str, batch: int, *overrides: str) -> Callable[[], object]:
    """Return one plain training step, in bf16, of a model in one of its variants."""
    from functools import partial

    import torch

    from moa_train.bench import plain, step
    from moa_train.bench.job import Job
    from moa_train.optim import clip_gradients
    from moa_train.optim.optimizers import Optimizers
    from moa_train.runtime.precision import Precision

    device = torch.device(scale.device)
    precision = Precision.resolve("fp32" if scale.small else "bf16", device)
    torch.set_float32_matmul_precision("high")
    overrides = overrides or MOA_T
    with composed(*overrides) as config:
        if scale.small:
            config.data.image_size, batch = 56, 2
        size = config.data.image_size
        if variant.startswith("timm"):
            import timm

            arguments = {} if size != 56 else {"img_size": 56}
            model: Any = timm.create_model("swin_tiny_patch4_window7_224", num_classes=1000, **arguments).to(device)
            optimizer = Optimizers([torch.optim.AdamW(model.named_parameters(), 1e-6, weight_decay=0.05, fused=True)])
        else:
            job = Job(config, [], None, 1000, device, rounds=1, seconds=1, steps=1, modes=["train"], batches=[batch],  # type: ignore[arg-type]
                      precisions=[], compiles=[], checkpointings=[False], against=[], ranks=1)  # fmt: skip
            entrant = step._ours(job, config, False)
            for word, change in {"old": old_code, "fp32 norms": old_norms, "selection": select_samples,
                                 "plain": plain_attention, "flex": flex_attention, "cast": cast_blocks}.items():  # fmt: skip
                if word in variant:
                    change()
            model, optimizer = entrant.build(precision)
    model = model.train()
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.rand(batch, 1000, device=device).softmax(1)
    called = model
    if "blocks" in variant:
        compile_blocks(model, backend="aot_eager" if scale.small else "inductor")
    elif "compiled" in variant:
        called = torch.compile(model, dynamic=False)
    clip = partial(clip_gradients, mode="norm", limit=5.0)
    if "graph" in variant:
        if "blocks" in variant:
            plain.update(called, optimizer, [(images, targets)], passes=1, precision=precision, clip=clip)
        with torch.autocast(scale.device, torch.bfloat16, cache_enabled=False):
            called = torch.cuda.make_graphed_callables(model, (torch.randn_like(images),))
    return partial(plain.update, called, optimizer, [(images, targets)], passes=1, precision=precision, clip=clip)


def time_step(report: Report, scale: Scale, variant: str, batches: list[int], *overrides: str) -> None:
    """Time a variant at some batches in this process; one process at a time uses the GPU, while others import."""
    import fcntl
    import signal

    import torch

    with composed(*overrides or MOA_T):  # imports
        import timm

        import moa_train.bench.step
    assert timm and moa_train.bench.step
    lock = (report.path.parent / f"{report.part}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    for batch in batches:
        signal.alarm(600 if scale.small else 100 if report.part == "warm_up" else 40)
        start = time.perf_counter()
        function = step_of(scale, variant, batch, *overrides)
        function()
        synchronize(scale)
        first = time.perf_counter() - start
        median, least, most = seconds(function, scale, 0.5, rounds=4)
        memory = 0.0 if scale.small else torch.cuda.max_memory_allocated() / 2**20
        report.row(f"{variant}, batch {batch}", None, images_s=batch / median, least=batch / most, most=batch / least,
                   ms=1e3 * median, first_s=first, MiB=memory, **kernels(function, scale, top=24))  # fmt: skip
        del function


def several(
    report: Report, scale: Scale, cases: list[tuple[str, list[int]]], *overrides: str, at_once: int = 3
) -> None:
    """Time variants, each in a process of its own, since they replace functions."""

    def run(case: tuple[str, list[int]]) -> None:
        variant, batches = case
        command = [sys.executable, __file__, "--variant", variant, "--batch", json.dumps(batches), "--run", report.part,
                   "--file", str(report.path), *["--small"] * scale.small, *overrides]  # fmt: skip
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            report.row(f"{variant}, batch {batches}", False, code=done.returncode, error=done.stderr[-1500:])

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, cases))


@part(TIMES, 110)
def step(report: Report, scale: Scale) -> None:
    """Time steps without a compiler."""
    several(report, scale, [("new", [128, 64, 256]), ("timm swin_t", [128, 64, 256]), ("old", [128]), ("new, graph", [128]),
                            ("new, plain attention", [128]), ("new, cast", [128]), ("new, selection", [128])])  # fmt: skip


COMPILED = ("new, blocks", "new, blocks, plain attention", "new, blocks, flex", "timm swin_t compiled")


@part(CHECKS, 75)
def warm_up(report: Report, scale: Scale) -> None:
    """Fill the compiler's cache while other parts check numbers."""
    path = report.path.with_name("warm-attention.jsonl")
    command = [sys.executable, __file__, "--run", "attention", "--file", str(path), *["--small"] * scale.small]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for number, variant in enumerate(
        COMPILED[: 1 if scale.small else 4]
    ):  # each with a lock of its own: at the same time
        report.path.with_name(f"warm_up{number}").mkdir(exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(
            lambda number: several(Report("warm_up", report.path.with_name(f"warm_up{number}") / "rows.jsonl"), scale,
                                   [(COMPILED[number], [128])]), range(1 if scale.small else 4)))  # fmt: skip
    first.wait()


@part(TIMES, 110)
def compiled(report: Report, scale: Scale) -> None:
    """Time compiled steps."""
    several(report, scale, [("new, blocks", [128, 64]), (COMPILED[1], [128]), (COMPILED[2], [128]), ("timm swin_t compiled", [128]),
                            ("new, blocks, graph", [128])])  # fmt: skip


MOA_T = ("model=moa_t", "data=imagenet", "data.root=.")
CIFAR = ("model=moa_b", "data=cifar100", "data.root=.")


@part(TIMES, 60)
def cifar(report: Report, scale: Scale) -> None:
    """Time a step of the CIFAR recipe's model, whose batch is 512."""
    if scale.small:
        return
    several(report, scale, [("new", [512]), ("new, plain attention", [512]), ("new, blocks", [512])], *CIFAR)


@part(TIMES, 20)
def copies(report: Report, scale: Scale) -> None:
    """Time the copy of a batch of images to the device, in turn with work and beside it."""
    import torch

    if scale.small:
        return
    host = torch.empty(128, 3, 224, 224, dtype=torch.uint8).pin_memory()
    matrix, stream = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()

    def in_turn() -> None:
        host.to("cuda", non_blocking=True)
        matrix @ matrix

    def ahead() -> None:
        with torch.cuda.stream(stream):
            host.to("cuda", non_blocking=True)
        matrix @ matrix

    for what, function in {
        "product alone": lambda: matrix @ matrix,
        "in turn": in_turn,
        "on a side stream": ahead,
    }.items():
        median, least, most = seconds(function, scale, 0.1)
        report.row(f"copy of 128 images: {what}", None, ms=1e3 * median, least=1e3 * least, most=1e3 * most)


# --- the frame ----------------------------------------------------------------------------------------------------


def run_part(name: str, limit: float, out: Path, work: Path, small: bool) -> list[dict[str, Any]]:
    """Run one part in a process group of its own, show what it prints, and return its rows."""
    path = work / f"{name}.jsonl"
    command = [sys.executable, __file__, "--run", name, "--file", str(path)] + ["--small"] * small
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, 9)

    timer = threading.Timer(limit, stop)
    timer.start()
    start = time.monotonic()
    assert process.stdout is not None
    with (out / "gpu.log").open("a") as log:
        for line in process.stdout:
            log.write(f"{name}: {line}")
            log.flush()
            print(f"{name:<10} {line[:330]}", end="" if line[:330].endswith("\n") else "\n", flush=True)
    code = process.wait()
    timer.cancel()
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if late.is_set() or code:
        what = f"not done within {limit:.0f} s" if late.is_set() else f"exit code {code}"
        rows.append({"part": name, "what": what, "ok": False})
    print(f"{name:<10} took {time.monotonic() - start:.0f} s", flush=True)
    return rows


def main() -> int:
    """Run the parts that were asked for."""
    every = {**CHECKS, **TIMES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--budget", type=float, default=36000.0, help="seconds after which no part is started")
    parser.add_argument("--small", action="store_true", help="everything in small on a CPU")
    for internal in ("--run", "--file", "--variant", "--batch"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.run:
        sys.path.insert(0, str(ROOT / "src"))
        report, scale = Report(options.run, Path(options.file)), Scale(options.small)
        if options.variant:
            time_step(report, scale, options.variant, json.loads(options.batch), *rest)
        else:
            every[options.run][1](report, scale)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="moa-gpu-"))
    start, rows = time.monotonic(), []
    left = lambda: options.budget - (time.monotonic() - start)  # noqa: E731
    checks = [name for name in options.parts if name in CHECKS]
    with ThreadPoolExecutor(len(checks) or 1) as pool:
        for found in pool.map(
            lambda name: run_part(
                name, min(CHECKS[name][0], left()) * (20 if options.small else 1), options.out, work, options.small
            ),
            checks,
        ):
            rows += found
    for name in options.parts:
        if name in TIMES and left() > 5:
            rows += run_part(
                name, min(TIMES[name][0], left()) * (20 if options.small else 1), options.out, work, options.small
            )
            (options.out / "GPU.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (options.out / "GPU.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row["ok"] is False]
    print(f"\n{len(rows)} rows, {len(wrong)} wrong, {time.monotonic() - start:.0f} s")
    for row in wrong:
        print(f"  WRONG {row['part']}: {row['what']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
