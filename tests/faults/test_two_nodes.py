"""Row 22: two nodes, each a network namespace of this machine; see two_nodes.py, which also measures."""

from collections.abc import Iterator

import pytest
import two_nodes
from launch import result

pytestmark = pytest.mark.fault(22)


@pytest.fixture(scope="module", autouse=True)
def cable() -> Iterator[None]:
    if lacking := two_nodes.missing():
        pytest.skip(lacking)
    with two_nodes.network():
        yield


IN_SHORT = (two_nodes.rank_killed, two_nodes.link_cut)


@pytest.mark.parametrize("scenario", two_nodes.SCENARIOS.values())
def test_two_nodes_end_with_the_same_bits(scenario, tmp_path, whole_pair, draw, inject, request):
    if scenario not in IN_SHORT and request.config.getoption("--fault-seed") == 0:
        pytest.skip("in `make torture` only")
    inject()
    scenario(tmp_path, draw.randint(0, 1))
    assert result(tmp_path / "run") == result(whole_pair)
