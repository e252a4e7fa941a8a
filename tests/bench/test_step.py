"""Model steps: all candidates run, and MACs and memory equal independent counts."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from moa_train.bench import memory, plain, step
from moa_train.bench.peers import build_peer, check_peer, read_arguments
from moa_train.interfaces import Classifier
from moa_train.model.summary import summarize
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.schema import OptimConfig, image_shape

CPU = torch.device("cpu")
SWIN = "swin_tiny_patch4_window7_224:img_size=32,patch_size=4,window_size=4,embed_dim=16,depths=(1,1),num_heads=(1,2)"


def test_there_is_a_table_per_case_with_all_candidates_and_ratios(job):
    peer = "torchvision/resnet18"
    tables = list(step.prepare(job(checkpointings=(False, True), batches=(2, 3), against=(peer,)))())
    assert [table.title.split(",")[0] + table.title.split(",")[2] for table in tables] == [
        "train batch 2", "train batch 3", "infer batch 2", "infer batch 3",
    ]  # fmt: skip
    names = [row.what for row in tables[0].rows]
    assert names == [
        "custom", "custom checkpointing", peer, "matrix product of 2048", "custom / custom checkpointing",
        f"custom / {peer}", "custom / custom checkpointing, per MAC", f"custom / {peer}, per MAC",
    ]  # fmt: skip
    assert [row.what for row in tables[2].rows] == [
        "custom",
        peer,
        "matrix product of 2048",
        f"custom / {peer}",
        f"custom / {peer}, per MAC",
    ]
    plainly, again, other = tables[0].rows[:3]
    assert 0 < plainly.facts["optimizer %"] < 100
    ratio, per_mac = tables[2].rows[-2:]
    expected = ratio.values[0] * tables[2].rows[0].facts["GMACs"] / tables[2].rows[1].facts["GMACs"]
    assert per_mac.values == pytest.approx([expected])
    assert plainly.facts["MiB"] > again.facts["MiB"] > 0
    assert other.facts["GMACs"] == pytest.approx(
        0.037, rel=0.1
    )  # its paper reports 1.82 for 224 x 224, which has 49 times the pixels
    assert tables[0].rows[4].values == [plainly.values[0] / again.values[0]]
    assert plainly.values[0] == pytest.approx(2 / plainly.facts["ms"] * 1e3)


def test_mfu_follows_from_counted_macs(job):
    work = job()
    training, inference = step.prepare(work)()
    for table, factor in ((training, 6), (inference, 2)):
        ours, product = table.rows
        reached = ours.values[0] * factor * ours.facts["GMACs"]
        assert ours.facts["MFU %"] == pytest.approx(100 * reached / product.values[0])
    config = work.config
    size = image_shape(config.data.image_size)
    counted = summarize(config.model, image_size=size, num_classes=10).total_macs
    assert ours.facts["GMACs"] == counted / 1e9


def test_peers_can_be_options_of_the_group_model(job, tiny):
    asked = []

    def compose(overrides):
        asked.append(list(overrides))
        return tiny({"model.depths": "[2,1]"})

    work = replace(job(against=("moa-train/vit_b_16",), modes=("infer",)), overrides=["a=b"], compose=compose)
    (table,) = step.prepare(work)()
    assert asked == [["a=b", "model=vit_b_16"]]
    assert table.rows[1].what == "moa-train/vit_b_16"
    assert table.rows[1].facts["GMACs"] != table.rows[0].facts["GMACs"]


@pytest.mark.parametrize("text", [f"timm/{SWIN}", "torchvision/swin_t"])
def test_peers_have_the_configured_number_of_classes(text):
    if text.startswith("timm"):
        pytest.importorskip("timm")
    assert check_peer(text, 7, (32, 32)).training is False
    with torch.no_grad():
        assert build_peer(text, 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere/resnet18", "Options: moa-train, timm, torchvision"),
        ("torchvision/resnet19", "Did you mean 'resnet1"),
        ("torchvision/resnet18:width=(1,", "Cannot parse the arguments"),
        ("torchvision/resnet18:width=open('x')", "Cannot parse the arguments"),
        ("torchvision/resnet18:**{'width': 1}", "Cannot parse the arguments"),
        ("torchvision/resnet18:width=1", "width"),
        ("torchvision/vit_b_16", "does not work for images of 32 x 32"),
    ],
)
def test_invalid_peers_are_rejected_before_any_measurement(job, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        step.prepare(job(against=(text,)))


def test_arguments_are_parsed_as_literals():
    text = "img_size=32,depths=(2,2),name='a=b, c',flag=False"
    assert read_arguments("", text) == {"img_size": 32, "depths": (2, 2), "name": "a=b, c", "flag": False}
    assert read_arguments("", "") == {}


def test_an_unsupported_precision_is_rejected_before_any_measurement(job):
    with pytest.raises(UserError, match="fp16 requires a GPU"):
        step.prepare(job(precisions=("fp32", "fp16")))


class Affine(Classifier, nn.Linear):
    """A model of one layer."""


def test_the_plain_update_equals_a_handwritten_one():
    torch.manual_seed(0)
    model, twin = Affine(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(5, 4), torch.rand(5, 3).softmax(1)) for _ in range(2)]
    plain.update(
        model, create_optimizer(OptimConfig(name="sgd", weight_decay=0.0, momentum=0.0), model, 0.1), batches, passes=2,
        precision=Precision.resolve("fp32", CPU), clip=lambda parameters: None,
    )  # fmt: skip
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    gradients = torch.autograd.grad(nn.functional.cross_entropy(twin(images), targets), list(twin.parameters()))
    for mine, its, gradient in zip(model.parameters(), twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(mine, its - 0.1 * gradient)
        assert mine.grad is None


def test_peak_memory_counts_live_tensors():
    kept = torch.zeros(1000)

    def work() -> None:
        first = torch.ones(5000)
        second = first + 1
        del first
        third = second * 2
        del second, third

    assert memory.peak(work, CPU, alive={"weights": [kept, kept.view(10, 100)]}, before=0) == 4 * (1000 + 2 * 5000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_excludes_earlier_allocations():
    device, other = torch.device("cuda"), torch.zeros(2**20, device="cuda")
    before = memory.allocated(device)
    kept = torch.zeros(2**20, device=device)
    assert memory.peak(lambda: kept + 1, device, alive=(), before=before) == 2 * kept.nbytes
    assert other.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_is_measured_for_every_candidate(job):
    for table in step.prepare(replace(job(against=("torchvision/resnet18",)), device=torch.device("cuda")))():
        assert all(row.facts["MiB"] > 0 for row in table.rows[:2])
