"""Injection points for the fault suite: off, and nearly free, unless MOA_TRAIN_FAULTS asks for them.

    MOA_TRAIN_FAULTS="checkpoint.before_rename=kill@2, loss=true@7/1"

kills this process at the second time it passes the point `checkpoint.before_rename`, and makes `point("loss")` answer
True at its seventh time, on rank 1 only. Without ``@n`` the first time is meant, without ``/rank`` every rank.
A worker that torchrun restarted (``--max-restarts``) is left alone, or it would meet the same end for ever.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moa_train.runtime.errors import UserError, choose

VARIABLE = "MOA_TRAIN_FAULTS"


class InjectedFaultError(RuntimeError):
    """What the action ``raise`` raises: a bug, as far as the rest of the program can tell."""


def _raise(point: str) -> None:
    raise InjectedFaultError(f"{VARIABLE} asked for an exception at {point}")


def _disk_full(point: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)


def _signal(number: signal.Signals) -> Callable[[str], None]:
    return lambda point: os.kill(os.getpid(), number)


_ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "int": _signal(signal.SIGINT),
    "usr1": _signal(signal.SIGUSR1),
    "hup": _signal(signal.SIGHUP),
    "raise": _raise,
    "full": _disk_full,
    "sleep": lambda point: time.sleep(1.0),
    "hang": lambda point: time.sleep(3600.0),
    "true": lambda point: None,
}


@dataclass
class _Fault:
    action: str
    at: int
    hits: int = 0


def _parse(environ: Mapping[str, str]) -> dict[str, _Fault]:
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return {}
    plan = {}
    for item in filter(None, (part.strip() for part in environ.get(VARIABLE, "").split(","))):
        match = re.fullmatch(r"([\w.]+)=([a-z0-9]+)(?:@(\d+))?(?:/(\d+))?", item)
        if match is None:
            raise UserError(f"{VARIABLE}: {item!r} is not understood; it reads point=action@n/rank.")
        name, action, at, rank = match.groups()
        if action not in _ACTIONS:
            raise UserError(choose(f"{VARIABLE}: {name}", action, _ACTIONS))
        if rank is None or rank == environ.get("RANK", "0"):
            plan[name] = _Fault(action, int(at or 1))
    return plan


_plan: dict[str, _Fault] = {}


def arm(environ: Mapping[str, str]) -> None:
    """Plan the faults that ``environ`` asks for, in place of those before."""
    global _plan
    _plan = _parse(environ)


arm(os.environ)


def point(name: str) -> bool:
    """Do here what MOA_TRAIN_FAULTS asks for; return True where it asks for ``true``, else False."""
    if not _plan:
        return False
    fault = _plan.get(name)
    if fault is None:
        return False
    fault.hits += 1
    if fault.hits != fault.at:
        return False
    _ACTIONS[fault.action](name)
    return fault.action == "true"
