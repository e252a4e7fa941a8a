"""Train with several processes. This is the only module that calls torch.distributed.

Tensors of the model are exchanged in the data group (NCCL between GPUs, gloo between CPUs). Messages between the hosts
are exchanged as JSON in a second group, which always uses gloo. They therefore never wait for a GPU and never
interleave with gradient reductions. Without torchrun, there is one process and no group, and every method returns
immediately.
"""

import inspect
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel

from moa_train.runtime.device import pick_device
from moa_train.runtime.errors import LostRankError, UserError
from moa_train.runtime.launcher import end_stuck_launcher
from moa_train.runtime.peer_watch import PeerWatch, connect
from moa_train.runtime.rendezvous import agree_on_attempt, choose_gloo_interface

FORWARD_BUFFERS = "forward_sync_buffers"
if FORWARD_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    FORWARD_BUFFERS = "broadcast_buffers"
"""Name of the DDP parameter that synchronizes buffers at each forward pass; it was renamed after torch 2.9."""

_LOST = (
    "Rank {rank} is exiting because it lost contact with another rank. {loss} Check that rank's output for the cause. "
    "The last checkpoint is valid; resume the run to continue."
)


@dataclass
class Distributed:
    """Represent this process as rank ``rank`` of ``world_size``, ``local_world_size`` of them on this machine."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    before_leaving: Callable[[], object] = lambda: None
    """Called before a stuck process is terminated; waits for work that must not be interrupted, such as a save."""
    _control: Any = None
    _watch: PeerWatch | None = field(default=None, repr=False)
    _pending: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes files and prints to the terminal."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def start(cls, device: str, timeout: float) -> Iterator[Self]:
        """Join the processes that torchrun started, or run as a single process; leave the group at the end.

        ``timeout`` (seconds) limits every wait for another process. If a rank hangs for longer, the run ends.
        """
        rank, world_size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
        if rank >= world_size:
            raise UserError(
                f"RANK={rank}, but WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}. Start the processes "
                "with torchrun, or unset RANK to run a single process."
            )
        if world_size > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set. Start the processes with torchrun.")
        local_world_size = _environment("LOCAL_WORLD_SIZE", world_size)
        chosen = pick_device(device, _environment("LOCAL_RANK", rank), local_world_size)
        self = cls(chosen, rank, world_size, local_world_size)
        if world_size == 1:
            with self._watched_launcher(timeout):
                yield self
            return
        limit = timedelta(seconds=timeout)
        cuda = chosen.type == "cuda"
        try:
            store = _open_store(rank, world_size, timeout)
            if world_size > local_world_size:
                choose_gloo_interface(store, rank, world_size, os.environ["MASTER_ADDR"])
            self._watch = self._watch_peers(store, timeout)
            if cuda:
                _refuse_shared_gpu(store, chosen, rank)
            backend, bound = ("nccl", chosen) if cuda else ("xccl" if chosen.type == "xpu" else "gloo", None)
            dist.init_process_group(
                backend, timeout=limit, device_id=bound, store=store, rank=rank, world_size=world_size
            )
            self._control = dist.new_group(backend="gloo", timeout=limit)
        except (RuntimeError, OSError, UserError) as error:
            if self._watch:
                self._watch.close(error)
            if isinstance(error, UserError):
                raise
            raise LostRankError(_not_met(rank, world_size, local_world_size, error)) from error
        try:
            yield self
            self.barrier()
        except BaseException as error:
            loss = self._loss(error)
            self._watch.close(error)
            if loss is None:
                self._abandon(error)
                raise
            lost = LostRankError(_LOST.format(rank=rank, loss=loss))
            end_stuck_launcher()
            self._abandon(lost)
            raise lost from error
        self._watch.close()
        self._leave()

    @contextmanager
    def _watched_launcher(self, timeout: float) -> Iterator[None]:
        """Save and stop if torchrun has exited, also with a single rank, which has no others to watch."""
        watch = None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            leave = self._leave_at_once
            watch = PeerWatch(self.rank, {}, timeout, abort=lambda: None, finish=lambda: None, leave=leave)
        try:
            yield
        finally:
            if watch is not None:
                watch.close()

    def _watch_peers(self, store: dist.Store, timeout: float) -> PeerWatch:
        connections = connect(
            self.rank,
            self.world_size,
            lambda place: store.set("watch", place),
            lambda: store.get("watch").decode(),
            os.environ["MASTER_ADDR"],
            timeout,
        )
        return PeerWatch(
            self.rank,
            connections,
            timeout,
            abort=self._abort,
            finish=lambda: self.before_leaving(),
            leave=self._leave_at_once,
        )

    def _abort(self) -> None:
        """Abort NCCL, so that a main thread that waits for a lost rank in NCCL or its kernels can continue."""
        if self.device.type == "cuda" and dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def _leave_at_once(self, reason: str) -> None:
        """Exit the process from the watch thread because the main thread is stuck."""
        text = _LOST.format(rank=self.rank, loss=reason)
        print(f"error: {text}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(LostRankError(text))
        end_stuck_launcher()
        os._exit(1)

    def _loss(self, error: BaseException) -> str | None:
        """Return sentences that describe the lost rank if ``error`` was caused by losing one, and otherwise None."""
        if not isinstance(error, RuntimeError):
            return None
        assert self._watch is not None
        of_gloo = any(words in str(error) for words in ("gloo", "Application timeout", "Timed out waiting"))
        if not (isinstance(error, dist.DistError) or of_gloo or self._watch.lost):
            return None
        if lost := self._watch.reason(patience=2.0):
            return lost
        detail = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        return f"A rank did not answer ({detail})."

    def _leave(self) -> None:
        """Destroy the groups and release the control group, which joins its threads.

        If such a thread released a Python tensor during interpreter shutdown, the process would abort.
        """
        dist.destroy_process_group()
        self._control = None
        self._pending = None  # after joining the threads, so that none of them holds the final reference

    def _abandon(self, error: BaseException) -> None:
        """Leave after a failure and report it to torchrun, which shows the first rank that failed as the root cause."""
        if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
        # NCCL and gloo may wait for ranks that no longer exist, so the shutdown is abandoned after one second.
        closing = threading.Thread(target=self._leave, daemon=True)
        closing.start()
        closing.join(1.0)

    # Communication between the hosts

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def gather_objects(self, value: object) -> list[Any]:
        """Return the JSON-serializable ``value`` of every rank, in rank order, on every rank."""
        return [_decode(data) for data in self.gather_bytes(_encode(value))]

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """Return ``value`` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._control)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def broadcast_object(self, value: object) -> Any:
        """Return the JSON-serializable ``value`` of rank 0 on every rank; JSON turns tuples into lists."""
        return self.gather_objects(value if self.is_main else None)[0]

    def on_main(self, function: Callable[[], object]) -> Any:
        """Run ``function`` on rank 0 only and return its JSON-serializable result on every rank.

        If ``function`` raises, every rank raises, so that no rank waits for one that has exited. The other ranks raise
        a UserError or a RuntimeError with the message of rank 0.
        """
        outcome: dict[str, object] = {}
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome = {"result": function()}
                _encode(outcome)
            except Exception as error:
                failure, outcome = error, {"error": str(error), "user": isinstance(error, UserError)}
        outcome = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        if "error" in outcome:
            kind = UserError if outcome["user"] else RuntimeError
            raise kind(f"rank 0: {outcome['error']}")
        return outcome["result"]

    def mean(self, value: float) -> float:
        """Return the mean of a host-side number over the ranks, bit-identical on every rank."""
        return sum(self.gather_objects(value)) / self.world_size

    def check_same(
        self,
        what: str,
        value: object,
        remedy: str = "Start every rank with the same command and the same code.",
    ) -> None:
        """Raise a UserError on every rank, with the differences, unless the JSON ``value`` is equal on all ranks."""
        everyone = self.gather_objects(value)
        if all(other == everyone[0] for other in everyone):
            return
        hosts = self.gather_objects(socket.gethostname())
        lines = [f"The ranks differ in {what}:"]
        flat = [dict(_leaves(other)) for other in everyone]
        keys = sorted({key for leaves in flat for key in leaves})
        different = [key for key in keys if len({leaves.get(key, "nothing") for leaves in flat}) > 1]
        for key in different[:6]:
            holders: dict[str, list[int]] = {}
            for rank, leaves in enumerate(flat):
                holders.setdefault(leaves.get(key, "nothing"), []).append(rank)
            shown = "; ".join(f"{text[:120]} on {_named(ranks, hosts)}" for text, ranks in holders.items())
            lines.append(f"  {key or 'value'}: {shown}")
        if len(different) > 6:
            lines.append(f"  and {len(different) - 6} more")
        raise UserError("\n".join([*lines, remedy]))

    def agree_any(self, flag: bool) -> bool:
        """Return whether any rank set its flag in the *previous* call. The result is the same on every rank.

        Call this method once per step. The reduction runs between the hosts while the step computes, so it never waits
        for a device and rarely for another rank. With a single process, the result is ``flag`` itself.
        """
        if self.world_size == 1:
            return flag
        answer = False
        if self._pending is not None:
            work, total = self._pending
            work.wait()
            answer = bool(total.item())
        total = torch.tensor([int(flag)])
        self._pending = (dist.all_reduce(total, dist.ReduceOp.MAX, group=self._control, async_op=True), total)
        return answer

    # Communication between the devices

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0, such as batch-normalization statistics, to every rank before an evaluation."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0, group=self._control if buffer.device.type == "cpu" else None)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap ``model`` so that the backward pass averages gradients over the ranks; return it as is for one process.

        The parameters and buffers of rank 0 are first copied to every rank. Buffers are synchronized at each forward
        pass only if the model has batch normalization, because other buffers (tables and constants) never change.
        """
        if self.world_size == 1:
            return model
        has_statistics = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
        forward_buffers: dict[str, Any] = {FORWARD_BUFFERS: has_statistics}
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **forward_buffers,
            # static_graph is not used: with no_sync, it fails or stops reducing (PyTorch issues 143580 and 187732).
            gradient_as_bucket_view=True,
        )

    def no_sync(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return a context that accumulates gradients without reducing them, for all micro-batches except the last."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"The environment variable {name}={text!r} must be a number; torchrun sets it.")
    return int(text)


def _open_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return the key-value store shared by the ranks, with a separate key prefix for each attempt."""
    limit = timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun serves the store. In torch 2.9, dist.rendezvous adds the restart count, which differs between nodes.
        store: dist.Store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
    else:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        store.set_timeout(limit)
    return dist.PrefixStore(agree_on_attempt(store, rank, world_size, timeout), store)


def _refuse_shared_gpu(store: dist.Store, device: torch.device, rank: int) -> None:
    """Raise UserError if another rank has taken this GPU."""
    properties = torch.cuda.get_device_properties(device)
    if store.add(f"gpu/{properties.uuid}", 1) > 1:
        raise UserError(
            f"Rank {rank} and another rank use the same GPU ({properties.name}, {properties.uuid}). Start one process "
            "per GPU: reduce --nproc-per-node, or give each process its own GPU (CUDA_VISIBLE_DEVICES, srun "
            "--gpus-per-task=1)."
        )


def _not_met(rank: int, world_size: int, local_world_size: int, error: Exception) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    text = (
        f"Rank {rank} of {world_size} could not connect to the other ranks through {place} "
        f"({str(error).splitlines()[0]}). Start all ranks with torchrun, and make sure that every machine can reach "
        "that address."
    )
    if world_size == local_world_size:
        return text
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
    text += (
        f" Machines must also reach each other on all ports of the network interface that gloo uses "
        f"(GLOO_SOCKET_IFNAME, now {interface}; `ip -brief address` lists interfaces)."
    )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        text += (
            " If this happened after a torchrun was replaced, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every "
            "torchrun, as scripts/train.slurm does."
        )
    return text


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return words for ``ranks``, such as "rank 2, 3 (node1)", with their hosts if there are several."""
    places = f" ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})" if len({*hosts}) > 1 else ""
    return f"rank {', '.join(map(str, ranks))}{places}"


def _encode(value: object) -> bytes:
    return json.dumps(value).encode()


def _decode(data: bytes) -> Any:
    return json.loads(data)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested JSON, such as ("optim.lr", "0.1")."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)
