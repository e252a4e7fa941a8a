"""Scenarios for one process and for two gloo ranks, which write results to a folder. Run by the fixture two_ranks."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import torch
import torch._dynamo
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from moa_train.cli.evaluate import evaluate as eval_command
from moa_train.cli.train import train as train_command
from moa_train.data.dataset import open_split
from moa_train.data.loader import EvalLoader
from moa_train.engine.evaluator import evaluate
from moa_train.engine.loss import soft_cross_entropy
from moa_train.engine.metrics import create_metrics
from moa_train.engine.step import TrainStep
from moa_train.interfaces import Batch
from moa_train.model.registry import create_model
from moa_train.optim.clip import clip_gradients
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.schema import DataConfig, EngineConfig, EvalConfig, MoaConfig, ModelConfig, OptimConfig
from moa_train.serialization import from_dict

BATCH, MICRO_BATCHES, CLASSES, LR = 24, 4, 5, 0.1


def model(num_classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    moa = MoaConfig(reduction=4, drop_path=0.0)
    config = ModelConfig(patch_size=2, embed_dim=16, depths=[1, 1], heads=[1, 2], window=4, drop_path=0.0, moa=moa)
    return create_model(config, image_size=(16, 16), num_classes=num_classes)


def samples() -> tuple[Tensor, Tensor]:
    """Images and target distributions of very different difficulty, float64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    images *= torch.linspace(0.1, 8, BATCH, dtype=torch.float64)[:, None, None, None]
    return images, torch.rand(BATCH, CLASSES, generator=generator, dtype=torch.float64).softmax(dim=1)


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a tensor, over the norm of that tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def accumulate(ranks: Distributed) -> dict:
    """Compare one update of TrainStep with torch's own on the whole batch at once."""
    images, targets = samples()
    large = model().double()
    loss = nn.functional.cross_entropy(large(images), targets)
    gradient = list(torch.autograd.grad(loss, list(large.parameters())))
    norm = torch.stack([part.square().sum() for part in gradient]).sum().sqrt()
    limit = 0.3 * norm.item()
    for parameter, part in zip(large.parameters(), gradient, strict=True):
        parameter.grad = part.clone()
    nn.utils.clip_grad_norm_(large.parameters(), limit)
    after = [parameter.detach() - LR * parameter.grad for parameter in large.parameters()]

    seen: dict = {"clips": 0, "micro": [], "reduced": [], "elements": 0}
    accumulated: list[Tensor] = []

    def transform(batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        seen["micro"].append(batch.micro)
        return images[batch.index], targets[batch.index]

    def clip(parameters: list[nn.Parameter]) -> Tensor:
        seen["clips"] += 1
        accumulated.extend(parameter.grad.clone() for parameter in parameters)
        return clip_gradients(parameters, config)

    config = OptimConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip="norm", clip_value=limit)
    trained = model().double()
    step = TrainStep(
        trained,
        create_optimizer(config, trained, LR),
        transform=transform,
        loss=soft_cross_entropy,
        clip=clip,
        precision=Precision.resolve("fp32", ranks.device),
        ema=None,
        micro_batches=MICRO_BATCHES // ranks.world_size,
        batch_size=BATCH,
        seed=0,
        distributed=ranks,
    )
    if ranks.world_size > 1:

        def reduce(group: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            seen["reduced"].append(len(seen["micro"]))  # micro-batches begun so far
            seen["elements"] += bucket.buffer().numel()
            return allreduce_hook(group, bucket)

        step.model.register_comm_hook(None, reduce)
    values = step(micro_batches(ranks), 0)
    return {
        **seen,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "gradient": relative(accumulated, gradient),
        "weights": relative(list(trained.parameters()), after),
        "loss": abs(ranks.mean(values["loss"].item()) / loss.item() - 1),
        "norm": abs(values["grad_norm"].item() / norm.item() - 1),
        "left": [name for name, parameter in trained.named_parameters() if parameter.grad is not None],
    }


def micro_batches(ranks: Distributed) -> Iterator[Batch]:
    """This rank's contiguous share of the global batch, then the next one's."""
    size, share = BATCH // MICRO_BATCHES, MICRO_BATCHES // ranks.world_size
    for step in count():
        for micro in range(ranks.rank * share, (ranks.rank + 1) * share):
            index = torch.arange(micro * size, (micro + 1) * size)
            zero = torch.zeros_like(index)
            yield Batch(torch.empty(size, 0), zero, index, zero, zero, step, micro)


def write_images(root: Path, number: int = 61) -> None:
    digits = load_digits()
    for place in range(number):
        folder = root / "test" / str(digits.target[place])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[place] * 15).astype("uint8")).save(folder / f"{place:03}.png")


def count_hits(ranks: Distributed, root: Path) -> dict:
    """Evaluate 61 files in batches of 8, 7 and 61, where rank 1 of 2 has none, read by 0 and 2 workers."""
    source = open_split(DataConfig(name="folder", root=str(root), image_size=16), "test")
    network = model(len(source.classes))
    engine = EngineConfig(metrics=["top1", "top5", "loss", "own_parts:Recall"], args={"Recall": {"classes": 10}})
    found = {}
    for batch_size in (8, 7, 61):
        for workers in (0, 2):
            loader = EvalLoader(
                source, batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size, workers=workers
            )
            result = evaluate(
                network, loader, pixels, metrics=create_metrics(engine), autocast=nullcontext, distributed=ranks
            )
            found[f"{batch_size} {workers}"] = result.as_dict()
    if ranks.world_size == 1:
        with torch.no_grad():
            (batch,) = EvalLoader(source, batch_size=len(source))
            logits = network.eval()(pixels(batch))
        found["logits"], found["labels"] = logits.tolist(), batch.labels.tolist()
    return found


def pixels(batch: Batch) -> Tensor:
    return batch.images.float() / 255


def engine(folder: Path) -> None:
    with Distributed.start("cpu", timeout=120) as ranks:
        found = {"accumulate": accumulate(ranks), "evaluate": count_hits(ranks, folder / "images")}
        (folder / f"engine-{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(found))


def train(folder: Path, name: str) -> None:
    assert train_command(from_dict(json.loads((folder / f"{name}.json").read_text())), []) == 0


def eval_(folder: Path) -> None:
    eval_command(EvalConfig(ckpt=str(folder / "whole"), device="cpu", output=str(folder / "eval.json")), [])


def start(folder: Path, scenario: Callable[[], None], ranks: int) -> None:
    """Fork the ranks, so that torch is imported only once, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        try:
            scenario()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"the ranks exited with {codes}")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    write_images(folder / "images")
    start(folder, lambda: engine(folder), 1)
    start(folder, lambda: engine(folder), 2)
    start(folder, lambda: train(folder, "whole"), 2)
    start(folder, lambda: train(folder, "first"), 2)
    start(folder, lambda: eval_(folder), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
