"""Outcomes of every image, recorded with and without logits, against loops in float64."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from moa_train.engine.metrics import NO_RANK
from moa_train.engine.predictions import OutcomeRecorder, Recorder
from moa_train.interfaces import Batch
from moa_train.runtime.distributed import Distributed

SOURCE = SimpleNamespace(classes=[f"class{number}" for number in range(7)], files=None, fingerprint="f")


def test_both_recorders_keep_the_same_outcomes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, generator=generator).mul(4).round()  # with ties
    labels, index = torch.randint(7, (20,), generator=generator), torch.randperm(20, generator=generator)
    alone, recorders = Distributed(torch.device("cpu")), (Recorder(), OutcomeRecorder())
    for rows in index.split(6):
        same = torch.zeros_like(rows)
        batch = Batch(torch.zeros(len(rows), 1), labels[rows], index=rows, epoch=same, repeat=same, step=0)
        for recorder in recorders:
            recorder(batch, logits[rows])
    found = recorders[0].gather(alone).outcomes(SOURCE), recorders[1].gather(alone, SOURCE)
    for name, value in vars(found[0]).items():
        assert np.array_equal(value, vars(found[1])[name]), name
    for row in range(20):
        values = logits[row].tolist()
        total = math.log(sum(math.exp(value) for value in values))
        order = sorted(range(7), key=lambda label: (-values[label], label))
        assert found[0].rank[row] == order.index(labels[row])
        assert found[0].top[row].tolist() == order[:5]
        assert np.allclose(found[0].top_log_probability[row], [values[label] - total for label in order[:5]], atol=1e-6)
        assert math.isclose(found[0].log_probability[row], values[labels[row]] - total, abs_tol=1e-6)


def test_an_image_without_probabilities_has_no_rank() -> None:
    logits, labels = torch.tensor([[1.0, math.nan, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([2, 2])
    rows, recorder = torch.arange(2), OutcomeRecorder()
    recorder(Batch(torch.zeros(2, 1), labels, index=rows, epoch=rows, repeat=rows, step=0), logits)
    found = recorder.gather(Distributed(torch.device("cpu")), SOURCE)
    assert found.rank.tolist() == [NO_RANK, 0]
