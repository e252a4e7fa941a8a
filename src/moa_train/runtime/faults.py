"""Injection points for the fault tests. They have no effect and almost no cost unless MOA_TRAIN_FAULTS is set.

    MOA_TRAIN_FAULTS="checkpoint.before_rename=kill@2, loss=true@7/1"

kills this process the second time it reaches the point `checkpoint.before_rename`, and makes the seventh call of
`point("loss")` return True, on rank 1 only. The default of ``@n`` is the first time, and that of ``/rank`` is every
rank. No fault is injected into a rank that torchrun restarted (``--max-restarts``), because it would fail repeatedly.
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
    """Represent a bug. The action ``raise`` raises this error."""


def _raise(point: str) -> None:
    raise InjectedFaultError(f"{VARIABLE} requested an exception at {point}")


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
            raise UserError(f"{VARIABLE}: {item!r} is invalid. The format is point=action@n/rank.")
        name, action, at, rank = match.groups()
        if action not in _ACTIONS:
            raise UserError(choose(f"{VARIABLE}: {name}", action, _ACTIONS))
        if rank is None or rank == environ.get("RANK", "0"):
            plan[name] = _Fault(action, int(at or 1))
    return plan


_plan: dict[str, _Fault] = {}


def arm(environ: Mapping[str, str]) -> None:
    """Replace the planned faults by those that ``environ`` requests."""
    global _plan
    _plan = _parse(environ)


arm(os.environ)


def point(name: str) -> bool:
    """Inject the fault that MOA_TRAIN_FAULTS requests for this point; return True if its action is ``true``."""
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
