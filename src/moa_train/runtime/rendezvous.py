"""How the ranks find each other: a fresh start in a store that may hold an earlier attempt's keys, and gloo's network.

Nothing here imports torch: `store` is any store of torch.distributed.
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
    """Return a name for this start of the ranks: the same on every rank, and never used before in ``store``.

    torchrun keeps its store, and the addresses of dead ranks in it, when it restarts the ranks, and its restart count
    differs between nodes (it counts the failures that each node saw). So rank 0 offers a new name until every rank has
    answered with a new name of its own, and then publishes the answers; a rank accepts an offer only if it finds its
    own answer there. Whatever an earlier attempt has left behind matches nothing.

    Raises:
        TimeoutError: a rank has not come within ``timeout`` seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        answers = [f"attempt/{own}/{other}" for other in range(1, world_size)]
        store.set("attempt/offer", own)
        missing = answers
        while missing := [key for key in missing if not store.check([key])]:
            if time.monotonic() > end:
                ranks = ", ".join(key.rpartition("/")[2] for key in missing[:8])
                raise TimeoutError(f"rank {ranks}{' and others' if len(missing) > 8 else ''} did not come")
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
    raise TimeoutError("rank 0 did not come" if not offer else "not all ranks came")


def choose_gloo_interface(store: Any, rank: int, world_size: int, master: str) -> None:
    """Set GLOO_SOCKET_IFNAME where this machine's name leads nowhere, as with Debian's 127.0.1.1 in /etc/hosts.

    gloo announces the address of the host name to the other machines. Where that is a loopback address, the interface
    that leads to the other machines is the right one. What the user has set stays.
    """
    address = _source_address(master)
    if rank == world_size - 1:  # on another machine than rank 0
        store.set("address", address or "")
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(_resolve(socket.gethostname())):
        return
    if _is_loopback(address):  # this is rank 0's machine, and ``master`` its own name
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
    """Return the address from which this machine would send to ``target``; sends nothing."""
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
