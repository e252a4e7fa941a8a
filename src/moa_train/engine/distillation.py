"""Knowledge distillation: training targets from the predictions of earlier runs (Hinton et al. 2015)."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from moa_train.engine.predictions import Outcomes, predictions_file
from moa_train.runtime.command_line import argument
from moa_train.runtime.device import to_device
from moa_train.runtime.errors import UserError


class Teachers:
    """The mean prediction of several teachers for every training image, blended into its target.

    A teacher's prediction is that for the whole image, without augmentation, as its evaluation of the training images
    recorded it: the probabilities of its most likely classes; the rest is spread evenly over the other classes.
    Distillation therefore costs no forward passes, and mixed images get the mixture of the predictions.

    Args:
        outcomes: the predictions of each teacher, for the same N images.
        weight: weight of the teachers in a target; the rest is that of the label.

    Attributes:
        fingerprint: identifies the predictions; a run that is resumed needs the same ones.
    """

    def __init__(self, outcomes: Sequence[Outcomes], weight: float) -> None:
        self.weight, self.num_classes = weight, len(outcomes[0].classes)
        self._tables: list[tuple[Tensor, Tensor, Tensor]] = []
        digest = blake2b(digest_size=8)
        for outcome in outcomes:
            top_NT, probability_NT = torch.from_numpy(outcome.top), torch.from_numpy(outcome.top_log_probability).exp()
            others = max(1, self.num_classes - top_NT.shape[1])
            rest_N1 = (1 - probability_NT.sum(1, keepdim=True)).clamp(min=0) / others
            self._tables.append((top_NT, probability_NT, rest_N1))
            digest.update(outcome.top.tobytes() + outcome.top_log_probability.tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def open(cls, folders: Sequence[str], weight: float, classes: Sequence[str], fingerprint: str) -> "Teachers":
        """Read what the runs in ``folders`` predict for the training images with these classes and fingerprint.

        Raises:
            UserError: a run has not been evaluated on the training images, or on other ones.
        """
        outcomes = []
        for folder in folders:
            path = predictions_file(Path(folder), "train")
            again = f"moa-eval {argument('ckpt', folder)} split=train"
            if not path.exists():
                raise UserError(
                    f"distill.teachers: {path} does not exist. Let the teacher predict the training images first: "
                    f"{again}"
                )
            outcome = Outcomes.read(path)
            if list(outcome.classes) != list(classes) or str(outcome.fingerprint) != fingerprint:
                raise UserError(
                    f"distill.teachers: {path} holds predictions for other training images (fingerprint "
                    f"{outcome.fingerprint}) than this run has ({fingerprint}). A teacher must be trained with "
                    "the same data, data.val_fraction and data.limit, so that no held-out image is in its training "
                    f"images. If the images changed after the teacher was evaluated, run: {again}"
                )
            outcomes.append(outcome)
        return cls(outcomes, weight)

    def __call__(self, targets_BK: Tensor, index_B: Tensor) -> Tensor:
        """Return the targets of images, blended with the teachers' mean prediction.

        Args:
            targets_BK: targets from the labels, float32, (B, K), on any device.
            index_B: positions of the images in the training split, int64, (B,), on the host.
        """
        soft_BK = torch.zeros(len(index_B), self.num_classes)
        for top_NT, probability_NT, rest_N1 in self._tables:
            rest_B1 = rest_N1[index_B]
            soft_BK += rest_B1
            soft_BK.scatter_add_(1, top_NT[index_B], probability_NT[index_B] - rest_B1)
        soft_BK /= len(self._tables)
        return targets_BK.lerp(to_device(soft_BK, targets_BK.device), self.weight)
