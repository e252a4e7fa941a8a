import numpy as np
import pytest
import torch

from moa_train.engine.mistakes import MistakesRecorder
from moa_train.runtime.distributed import Distributed


class Part:
    def __init__(self, index: torch.Tensor, labels: torch.Tensor) -> None:
        self.index, self.labels = index, labels


@pytest.mark.parametrize("batches", [1, 3])
def test_confusion_and_worst_mistakes_by_loops(batches):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=generator).repeat(2, 1)  # equal probabilities: the lower index comes first
    labels = torch.randint(4, (60,), generator=generator)
    recorder = MistakesRecorder(7)
    for part in torch.randperm(60, generator=generator).chunk(batches):
        recorder(Part(part, labels[part]), logits[part])
    with Distributed.start("cpu", 60.0) as distributed:
        found = recorder.gather(distributed)
    confusion = np.zeros((4, 4), np.int64)
    mistakes = []
    for index, (row, label) in enumerate(zip(logits, labels.tolist(), strict=True)):
        predicted = int(row.argmax())
        confusion[label, predicted] += 1
        if predicted != label:
            mistakes.append((-float(row.softmax(0)[predicted]), index, label, predicted))
    expected = sorted(mistakes)[:7]
    assert np.array_equal(found.confusion, confusion)
    assert found.index.tolist() == [index for _, index, _, _ in expected]
    assert found.labels.tolist() == [label for _, _, label, _ in expected]
    assert found.predicted.tolist() == [predicted for _, _, _, predicted in expected]
    np.testing.assert_allclose(found.probability, [-negative for negative, _, _, _ in expected], rtol=1e-6)


def test_samples_without_probabilities_do_not_count():
    logits = torch.eye(3)
    logits[0, 1] = torch.nan
    recorder = MistakesRecorder(3)
    recorder(Part(torch.arange(3), torch.tensor([0, 1, 1])), logits)
    with Distributed.start("cpu", 60.0) as distributed:
        found = recorder.gather(distributed)
    assert found.confusion.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert found.index.tolist() == [2]


def test_many_classes_have_no_matrix():
    recorder = MistakesRecorder(1)
    recorder(Part(torch.tensor([0, 1]), torch.tensor([5, 6])), torch.eye(1001)[[5, 5]])
    with Distributed.start("cpu", 60.0) as distributed:
        found = recorder.gather(distributed)
    assert found.confusion is None
    assert (found.index.tolist(), found.predicted.tolist()) == ([1], [5])
