"""A model: two convolutions and a linear layer."""

from dataclasses import dataclass

from torch import Tensor, nn

from moa_train.interfaces import Classifier
from moa_train.knobs import knob
from moa_train.schema import ModelConfig


@dataclass
class TinyArgs:
    width: int = knob(8, "channels of the second convolution; the first has half of them", least=2)


class Tiny(Classifier):
    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int], num_classes: int, args: TinyArgs) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, args.width // 2, 3, stride=2, padding=1)
        self.body = nn.Conv2d(args.width // 2, args.width, 3, stride=2, padding=1)
        self.head = nn.Linear(args.width, num_classes)  # the name that init_head=new looks for

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.body(self.stem(images_BCHW).relu()).relu()
        return self.head(x_BCHW.mean((2, 3)))

    def layer_names(self) -> list[str]:  # optional: makes optim.layer_decay possible
        return ["stem", "body"]
