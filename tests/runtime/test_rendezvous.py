import os
import socket
import threading
import time

import pytest
import torch.distributed as dist

from moa_train.runtime import rendezvous
from moa_train.runtime.rendezvous import agree_on_attempt, choose_gloo_interface


def meet(store: dist.Store, ranks: list[int], late: int = 0) -> dict[int, str]:
    """Let ranks agree in threads, as if in processes, where rank ``late`` begins a moment after the others."""
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        names[rank] = agree_on_attempt(store.clone(), rank, len(ranks), 20.0)

    threads = {rank: threading.Thread(target=join, args=(rank,)) for rank in ranks}
    for rank, thread in threads.items():
        if rank != late:
            thread.start()
    time.sleep(0.2)
    threads[late].start()
    for thread in threads.values():
        thread.join()
    return names


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_every_attempt_has_a_name_of_its_own_in_one_store(store):
    """What torchrun does after a failure: the same store, with all that the earlier attempts have left in it."""
    seen = []
    for late in (0, 1, 2):
        names = meet(store, [0, 1, 2], late)
        assert len(set(names.values())) == 1
        seen.append(names[0])
    assert len(set(seen)) == 3


def test_an_attempt_that_not_all_reached_does_not_disturb_the_next(store):
    with pytest.raises(TimeoutError, match="rank 2 did not join"):
        agree_alone(store)
    assert len(set(meet(store, [0, 1, 2]).values())) == 1


def agree_alone(store: dist.Store) -> None:
    """Ranks 0 and 1 of 3."""

    def second() -> None:
        with pytest.raises(TimeoutError, match="not all ranks joined"):
            agree_on_attempt(store.clone(), 1, 3, 0.5)

    thread = threading.Thread(target=second)
    thread.start()
    try:
        agree_on_attempt(store, 0, 3, 0.5)
    finally:
        thread.join()


def test_a_rank_whose_rank_0_never_comes_says_so(store):
    with pytest.raises(TimeoutError, match="rank 0 did not join"):
        agree_on_attempt(store, 1, 2, 0.2)


def test_interfaces_are_found_by_their_address():
    assert rendezvous._interface_of("127.0.0.1") in ("lo", "lo0")
    assert rendezvous._interface_of("192.0.2.1") is None  # of documentation
    assert rendezvous._source_address("127.0.0.1") == "127.0.0.1"
    assert rendezvous._is_loopback("127.0.1.1")
    assert rendezvous._is_loopback("::1%lo")
    assert not rendezvous._is_loopback("192.0.2.1")


def test_gloos_interface_is_the_users_choice_and_never_loopback(store, monkeypatch):
    """That the right one is found is shown on two nodes, in tests/faults."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_gloo_interface(store, 1, 2, "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    choose_gloo_interface(store, 1, 2, "127.0.0.1")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
