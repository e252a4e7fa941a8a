"""The part of moa-bench that traces training steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moa_train.bench import trace
from moa_train.runtime.errors import UserError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(), nn.Sequential()])
        self.layers[0].add_module("mlp", nn.Sequential(nn.Linear(4, 8), nn.GELU()))
        self.layers[1].add_module("attn", nn.Linear(8, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x * 2)


def test_operations_of_both_passes_belong_to_the_part_that_called_them():
    model = Model()
    with trace.Trace(model) as traced:
        model(torch.randn(3, 4)).logsumexp(1).sum().backward()
    parts = {kind: {part for known, part in traced.seconds if known == kind} for kind in trace.KINDS}
    assert parts["matrix products"] == {"mlp", "attn"}
    assert parts["GELU"] == {"mlp"}
    assert parts["layer norm"] == {"norm"}
    assert "windows, residuals" in parts["additions, multiplications"]  # in the forward pass of the whole model
    assert ("other operations", trace.UPDATE) in traced.seconds  # the loss
    before = dict(traced.seconds)
    model(torch.randn(3, 4)).sum().backward()
    assert traced.seconds == before  # hooks are removed


@pytest.mark.parametrize("against", [(), ("timm/test_vit:img_size=32",)])
def test_kinds_and_parts_add_up_to_the_step(job, against):
    threads = torch.get_num_threads()
    kinds, parts = trace.prepare(replace(job(), against=against, rounds=2))()
    assert torch.get_num_threads() == threads
    for table in (kinds, parts):
        total, *rows = sorted(table.rows, key=lambda row: row.what != "total")
        for number, expected in enumerate(total.values):
            assert sum(row.values[number] for row in rows) == pytest.approx(expected)
        assert all(set(row.facts) == {text.partition(":")[0] for text in against} for row in table.rows)
    assert {row.what for row in kinds.rows} >= {"total", "matrix products", "layer norm", "GELU", "softmax", "copies"}
    assert {row.what for row in parts.rows} >= {"total", "attn", "mlp", "moa", "patch_embed", trace.UPDATE}


def test_a_gpu_has_its_own_profiler(job):
    with pytest.raises(UserError, match=r"tracking\.profile_steps"):
        trace.prepare(replace(job(), device=torch.device("cuda")))
