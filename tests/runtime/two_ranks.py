"""What test_distributed starts: four pairs of gloo ranks, with the environment that torchrun gives.

Every rank writes what it saw to <folder>/<scenario>-<rank>.json, or its traceback to .txt; codes.json has how each
ended.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it
from torch import nn

from moa_train.runtime import faults
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError


def refused(action) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "accepted"


def agreements(ranks: Distributed) -> dict:
    def fail(error: Exception):
        raise error

    seen = {
        "broadcast": ranks.broadcast_object({"from": ranks.rank, "nested": [1, None, "ä", 0.1]}),
        "broadcast_long": len(ranks.broadcast_object("x" * 1_000_000)),
        "gather": ranks.gather_objects("ab" * ranks.rank),
        "mean": ranks.mean(0.1 + ranks.rank),
        "on_main": ranks.on_main(lambda: {"rank": ranks.rank}),
        "on_main_user": refused(lambda: ranks.on_main(lambda: fail(UserError("no such folder")))),
        "same": refused(lambda: ranks.check_same("their seed", {"a": [1, 2], "b": None})),
        "other": refused(
            lambda: ranks.check_same("their configuration", {"seed": 1, "optim": {"lr": 0.1 * (1 + ranks.rank)}})
        ),
        "other_keys": refused(lambda: ranks.check_same("x", {"only": 1} if ranks.rank else {})),
    }
    try:
        ranks.on_main(lambda: fail(OSError("disk on fire")))
    except Exception as error:
        seen["on_main_bug"] = f"{type(error).__name__}: {error}"
    # Rank 1 raises its flag in the third call: all hear of it in the fourth.
    seen["agree_any"] = [ranks.agree_any(ranks.rank == 1 and call == 2) for call in range(5)]
    return seen


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh()).square().sum()


def accumulate(ranks: Distributed) -> dict:
    """Compare the gradient of 8 micro-batches, shared by the ranks, with that of all samples at once."""
    torch.manual_seed(ranks.rank)  # different parameters, until wrap() makes them those of rank 0
    model = Network().double()
    wrapped = ranks.wrap(model)
    samples = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = samples.chunk(8)[ranks.rank * 4 : ranks.rank * 4 + 4]
    errors = []
    for _ in range(3):  # DDP rebuilds its buckets after the first step
        for number, micro_batch in enumerate(share):
            if number < 3:
                with ranks.no_sync(wrapped):
                    (wrapped(micro_batch) * ranks.world_size).backward()
            else:
                (wrapped(micro_batch) * ranks.world_size).backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        expected = torch.autograd.grad(model(samples), list(model.parameters()))
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                parameter -= 0.01 * gradient
    return {"error": max(errors)}


def buffers(ranks: Distributed) -> dict:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = ranks.wrap(model)
    for step in range(2):
        wrapped(torch.randn(4, 2, generator=torch.Generator().manual_seed(10 * step + ranks.rank))).sum().backward()
    before = model[1].running_mean.tolist()
    ranks.broadcast_buffers(model)
    return {"before": before, "after": model[1].running_mean.tolist(), "wrapped": wrapped.broadcast_buffers}


def gloo_threads() -> int:
    return sum(path.read_text().startswith("pt_gloo") for path in Path("/proc/self/task").glob("*/comm"))


def rank_of(folder: Path, scenario: str) -> None:
    seen: dict = {}
    with Distributed.start("cpu", timeout=5.0 if scenario == "hanging" else 60.0) as ranks:
        seen["place"] = [ranks.rank, ranks.world_size, ranks.local_world_size, ranks.is_main]
        if scenario == "all":
            for part in (agreements, accumulate, buffers):
                seen[part.__name__] = part(ranks)
        ranks.barrier()
        inside = gloo_threads()
        if scenario == "raising" and ranks.rank == 1:
            raise RuntimeError("the root cause")
        if scenario == "hanging":
            faults.arm({"MOA_TRAIN_FAULTS": "hang=stop/1", "RANK": os.environ["RANK"]})
            faults.point("hang")
        if scenario in ("raising", "hanging"):
            ranks.barrier()
        if scenario == "stuck":
            ranks.before_leaving = (folder / "saved").touch
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ctypes.CDLL(None).sleep(3600)  # a launch behind a kernel that waits for the dead rank
    seen["threads"] = [inside, gloo_threads()]
    (folder / f"{scenario}-{ranks.rank}.json").write_text(json.dumps(seen))


def start(folder: Path, scenario: str, rank: int, port: int) -> int:
    """Fork a rank: importing torch once for all of them is what makes this test quick."""
    child = os.fork()
    if child:
        return child
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{scenario}-{rank}-error.json")
    try:
        rank_of(folder, scenario)
    except BaseException:
        (folder / f"{scenario}-{rank}.txt").write_text(traceback.format_exc())
        (folder / f"{scenario}-{rank}-threads.txt").write_text(str(gloo_threads()))
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in range(4)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    names = ("all", "raising", "hanging", "stuck")
    ranks = {
        f"{name}-{rank}": start(folder, name, rank, port)
        for name, port in zip(names, ports, strict=True)
        for rank in (0, 1)
    }
    stopped = ranks.pop("hanging-1")
    try:
        codes = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in ranks.items()}
        codes["hanging-1"] = "stopped" if os.WIFSTOPPED(os.waitpid(stopped, os.WUNTRACED)[1]) else "gone"
    finally:
        os.kill(stopped, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
