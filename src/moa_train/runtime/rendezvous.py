"""Let the ranks find each other: separate attempts that share a store, and choose gloo's network interface.

This module does not import torch. `store` is any store of torch.distributed.
"""

import fcntl
import ipaddress
import json
import os
import socket
import struct
import time
import uuid
from typing import Any

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def agree_on_attempt(store: Any, rank: int, world_size: int, timeout: float) -> str:
    """Return a name for this start of the ranks that is the same on every rank and was never used before in ``store``.

    When torchrun restarts the ranks, it keeps its store, including the addresses of dead ranks. Its restart count
    differs between nodes, because each node counts only the failures that it saw. Rank 0 therefore offers a new name,
    waits until every rank has answered with a new name of its own, and publishes the answers. A rank accepts an offer
    only if its own answer is among them. Keys of an earlier attempt never match.

    Raises:
        TimeoutError: a rank did not join within ``timeout`` seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        answers = [f"attempt/{own}/{other}" for other in range(1, world_size)]
        store.set("attempt/offer", own)
        missing = answers
        while missing := [key for key in missing if not store.check([key])]:
            if time.monotonic() > end:
                ranks = ", ".join(key.rpartition("/")[2] for key in missing[:8])
                raise TimeoutError(f"rank {ranks}{' and others' if len(missing) > 8 else ''} did not join")
            time.sleep(0.05)
        store.set(f"attempt/{own}/all", json.dumps([store.get(key).decode() for key in answers]))
        return own
    offer = ""
    while time.monotonic() < end:
        if store.check(["attempt/offer"]):
            if (current := store.get("attempt/offer").decode()) != offer:
                offer = current
                store.set(f"attempt/{offer}/{rank}", own)
            if store.check([key := f"attempt/{offer}/all"]) and json.loads(store.get(key))[rank - 1] == own:
                return offer
        time.sleep(0.05)
    raise TimeoutError("rank 0 did not join" if not offer else "not all ranks joined")


def choose_gloo_interface(store: Any, rank: int, world_size: int, master: str) -> None:
    """Set GLOO_SOCKET_IFNAME if this machine's name resolves to a loopback address, as in Debian's /etc/hosts.

    gloo announces the address of the host name to the other machines. If that is a loopback address, gloo must use the
    interface that leads to the other machines instead. A value of GLOO_SOCKET_IFNAME set by the user is kept.
    """
    address = _source_address(master)
    if rank == world_size - 1:  # this rank runs on a different machine than rank 0
        store.set("address", address or "")
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(_resolve(socket.gethostname())):
        return
    if _is_loopback(address):  # this is rank 0's machine, and ``master`` is its own name
        address = _source_address(store.get("address").decode())
    if not _is_loopback(address) and (name := _interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _resolve(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _source_address(target: str) -> str | None:
    """Return the address from which this machine would send to ``target``, without sending anything."""
    try:
        family, _, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface_of(address: str | None) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))[20:24]
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None
