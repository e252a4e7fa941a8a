"""The configuration of a run: the only declaration of every setting with its default, allowed values and help text.

``RunConfig`` has one section per group of ``conf/``. Hydra composes YAML onto it and rejects unknown keys and wrong
types; `validation.validate` checks ranges, options and rules that span several settings. Every checkpoint contains the
result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moa_train.knobs import knob
from moa_train.plugins import (
    AUGMENTATIONS,
    DATASETS,
    LOGGERS,
    LOSSES,
    METRICS,
    MODELS,
    OPTIMIZERS,
    SCHEDULES,
    Plugins,
    is_own_code,
    short_name,
)
from moa_train.runtime.errors import UserError, choose

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
KERNELS = ("auto", "fused", "plain")
COMPILE_MODES = ("auto", "blocks", "model", "false")
SPLITS = ("train", "val", "test")

path = partial(knob, form="path")
period = partial(knob, form="duration")


@dataclass
class MoaConfig:
    """Multi-resolution overlapped attention (MOA) between the stages; applies to model.name=moa only."""

    enabled: bool = knob(
        True, "use MOA blocks; false: local windows only, the baseline of the paper's Table 7", fixed=True
    )
    form: str = knob(
        "paper",
        "paper: spatial layout as described in the paper; published: identical to the published code",
        options=("paper", "published"),
        fixed=True,
    )
    overlap: int = knob(
        1, "positions by which keys extend into the neighboring windows on each side (Table 5)", least=0, fixed=True
    )
    reduction: int = knob(
        32, "MOA blocks reduce their input to 1 / reduction of the channels (Table 6)", least=1, fixed=True
    )
    drop_path: float = knob(
        0.2,
        "drop path rate of the last MOA block; the rate rises linearly from 0 over the MOA blocks",
        least=0,
        most=0.99,
    )


@dataclass
class ModelConfig:
    """Model architecture. Baselines use only the settings that apply to them."""

    name: str = knob("moa", "architecture", plugins=MODELS, fixed=True)
    variant: str = knob(
        "custom", "name of this configuration in folders and tables; name=timm: the model's name in timm"
    )
    patch_size: int = knob(
        4,
        "side of a patch in pixels (resnet: 4 selects the ImageNet stem, 1 and 2 select 3x3 stems)",
        least=1,
        fixed=True,
    )
    embed_dim: int = knob(96, "channels of the first stage; each patch merging doubles them", least=1, fixed=True)
    depths: list[int] = knob([2, 2, 8], "number of blocks in each stage (vit: one number)", least=1, fixed=True)
    heads: list[int] = knob([3, 6, 12], "attention heads in each stage", least=1, fixed=True)
    window: int = knob(14, "side of a local window in positions (Table 4)", least=1, fixed=True)
    mlp_ratio: float = knob(4.0, "hidden width of an MLP relative to its input width", above=0, fixed=True)
    conv: list[str] = knob(
        [],
        "where to use 3x3 convolutions, which help on small data sets. stem: instead of the patch embedding; "
        "merging: instead of each patch merging; block: depthwise, before each local block; mlp: depthwise, in its MLP",
        options=("stem", "merging", "block", "mlp"),
        fixed=True,
    )
    stem_blocks: int = knob(
        0, "conv=[stem]: residual 3x3 convolutions at each resolution of the stem", least=0, fixed=True
    )
    dropout: float = knob(0.0, "dropout rate after attention and in MLPs", least=0, most=0.99)
    drop_path: float = knob(
        0.1,
        "drop path rate of the last local block; the rate rises linearly from 0 over the blocks",
        least=0,
        most=0.99,
    )
    checkpointing: bool = knob(
        False, "recompute activations in the backward pass: a quarter to a third of the memory, a third more time"
    )
    moa: MoaConfig = field(default_factory=MoaConfig)
    args: dict[str, Any] = knob(
        {}, "settings of your own model, or of timm's (see --help model=timm): model.args.KEY=VALUE", fixed=True
    )

    @property
    def title(self) -> str:
        """Return the name of the model in folders and tables."""
        return short_name(self.name) if is_own_code(self.name) else self.variant


@dataclass
class DataConfig:
    """Images and labels."""

    name: str = knob("digits", "data set", plugins=DATASETS, fixed=True)
    root: str | None = path(None, "folder of the data set (default: data/NAME; required for imagenet and folder)")
    image_size: Any = knob(32, "image size in pixels: one number, or [height, width]", fixed=True)
    download: bool | None = knob(
        None,
        "download the data set (cifar10, cifar100) if root does not hold it (default: only if root is not set)",
    )
    url: str | None = knob(None, "address to download from, such as a mirror (default: that of the publisher)")
    val_fraction: float = knob(
        0.0, "fraction of the training images to hold out as the validation split", least=0, most=0.5, fixed=True
    )
    limit: int | None = knob(
        None, "train on this many evenly spaced images only (default: all images)", least=1, fixed=True
    )
    workers: int | None = knob(
        None,
        "processes per rank that decode image files (default: measured if training runs on a CPU; on a GPU, CPU cores "
        "/ ranks, at most 8)",
        least=0,
    )
    mean: list[float] | None = knob(
        None, "channel means for normalization, 0 to 1 (default: those of the data set)", least=0, most=1
    )
    std: list[float] | None = knob(
        None, "channel standard deviations for normalization (default: those of the data set)", above=0, most=1
    )
    hold_out: str = knob(
        "position",
        "how val_fraction chooses images in class folders. name: by a hash of the file name, so that adding or "
        "removing a file does not affect other files; position: by position in the sorted list, as in older versions",
        options=("name", "position"),
        fixed=True,
    )
    unreadable: str = knob(
        "fail",
        "response to unreadable training images: fail; quarantine: use the next readable image instead; "
        "in evaluation, they are always an error",
        options=("fail", "quarantine"),
    )
    unreadable_budget: int = knob(
        100, "unreadable=quarantine: number of unreadable files per rank before the run fails", least=0
    )
    max_pixels: int = knob(100_000_000, "images with more pixels count as unreadable", least=1)
    max_seconds: float = knob(60.0, "longest time to decode an image, in seconds; then, the run fails", above=0)
    range: list[float] | None = knob(
        None,
        "[LOW,HIGH]: gray levels of black and white in images with more than 8 bits per channel (default: the full "
        "range of 16-bit images; floating-point and 32-bit images are then errors)",
        fixed=True,
    )
    eval_crop: float = knob(
        0.875, "in evaluation, side of the center crop relative to the resized image", above=0, most=1
    )
    args: dict[str, Any] = knob({}, "settings of your own data set: data.args.KEY=VALUE", fixed=True)


@dataclass
class AugmentConfig:
    """Augmentation of the training images."""

    crop: str = knob(
        "pad",
        "pad: random crop of the zero-padded image; resized: random resized crop; none: no crop",
        options=("pad", "resized", "none"),
    )
    padding: int = knob(4, "crop=pad: pixels of padding on each side", least=0)
    scale: list[float] = knob(
        [0.08, 1.0], "crop=resized: range of the crop's area relative to the image", above=0, most=1
    )
    ratio: list[float] = knob([0.75, 1.3333], "crop=resized: range of the crop's width / height", above=0)
    interpolation: str = knob("bicubic", "resampling filter for image files", options=("bilinear", "bicubic"))
    flip: float = knob(0.5, "probability of a horizontal flip", least=0, most=1)
    alternating_flip: bool = knob(
        False, "flip every image in every other epoch instead of at random, so that two epochs see both versions"
    )
    randaugment_ops: int = knob(0, "RandAugment: operations per image; 0 disables it; usual: 2", least=0)
    randaugment_magnitude: float = knob(9.0, "RandAugment: mean strength of an operation", least=0, most=10)
    randaugment_std: float = knob(0.5, "RandAugment: standard deviation of the strength", least=0)
    color_jitter: float = knob(
        0.0, "largest relative change of brightness, contrast and saturation; 0 disables the change", least=0, most=1
    )
    erasing: float = knob(0.0, "probability of random erasing with noise; usual: 0.25", least=0, most=1)
    extra: list[str] = knob(
        [], "your own augmentations, applied to uint8 batches before normalization", plugins=AUGMENTATIONS
    )
    mixup: float = knob(0.0, "alpha of mixup; 0 disables it", least=0)
    cutmix: float = knob(0.0, "alpha of cutmix; 0 disables it", least=0)
    mix_prob: float = knob(1.0, "probability that a micro-batch is mixed", least=0, most=1)
    mix_switch_prob: float = knob(0.5, "probability of cutmix when mixup is enabled as well", least=0, most=1)
    label_smoothing: float = knob(0.0, "probability mass spread evenly over all classes", least=0, most=0.99)
    repeats: int = knob(
        1,
        "repeated augmentation: number of times each image occurs per epoch, with different augmentation",
        least=1,
        fixed=True,
    )
    weak_for: str = period(
        "0%", "length of the last part of the run, which uses only crop and flip: 10 epochs, 5%, ..."
    )
    args: dict[str, Any] = knob({}, "settings of your own augmentations: augment.args.NAME.KEY=VALUE")


@dataclass
class LossConfig:
    """Training objective."""

    name: str = knob("cross_entropy", "loss, a function of logits and target distributions", plugins=LOSSES)
    args: dict[str, Any] = knob({}, "settings of your own loss: loss.args.KEY=VALUE")


@dataclass
class DistillConfig:
    """Knowledge distillation: learn from the predictions of earlier runs as well."""

    teachers: list[str] = path(
        [],
        "run folders; the mean of their predictions becomes part of the targets. First run moa-eval ckpt=RUN "
        "split=train for each",
    )
    weight: float = knob(
        0.5, "weight of the teachers' prediction in the targets; the rest is that of the label", least=0, most=1
    )


@dataclass
class OptimConfig:
    """Optimizer."""

    name: str = knob("adamw", "optimizer", plugins=OPTIMIZERS, fixed=True)
    lr: float = knob(9e-4, "peak learning rate for a batch of lr_batch examples", above=0)
    lr_scaling: str = knob(
        "linear", "how learning rates scale with the global batch size", options=("linear", "sqrt", "none")
    )
    lr_batch: int = knob(512, "batch size that lr, min_lr and warmup_lr refer to", least=1)
    layer_decay: float = knob(
        1.0,
        "layer-wise lr decay: factor on the lr per layer below the head; 1 disables it",
        above=0,
        most=1,
        fixed=True,
    )
    weight_decay: float = knob(
        0.05, "weight decay, decoupled except for SGD; biases, 1-D parameters and position tables are exempt", least=0
    )
    betas: list[float] = knob([0.9, 0.999], "AdamW: decay rates of the two moments", least=0, below=1)
    eps: float = knob(1e-8, "AdamW: term added to the denominator", above=0)
    momentum: float = knob(0.9, "momentum of SGD and Muon", least=0, below=1)
    muon_precision: str = knob(
        "auto",
        "name=muon: precision of the orthogonalization; auto: measured, unless the run is deterministic",
        options=("auto", "bf16", "fp32"),
    )
    clip: str = knob(
        "norm",
        "gradient clipping. norm: by the norm of all gradients; value: of every entry; none: no clipping",
        options=("norm", "value", "none"),
    )
    clip_value: float = knob(5.0, "largest gradient norm (clip=norm) or largest absolute entry (clip=value)", above=0)
    args: dict[str, Any] = knob({}, "settings of your own optimizer: optim.args.KEY=VALUE", fixed=True)


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the step. Durations: 300 epochs, 5000 steps, 1e6 examples, or 5% (of the run)."""

    name: str = knob("cosine", "shape of the learning rate curve after the warmup", plugins=SCHEDULES)
    duration: str = period("300 epochs", "length of the run, in epochs, steps or examples")
    warmup: str = period("20 epochs", "length of the linear warmup, which is part of the duration")
    warmup_lr: float = knob(9e-7, "learning rate of the first step, for a batch of optim.lr_batch", least=0)
    min_lr: float = knob(5e-6, "final learning rate, for a batch of optim.lr_batch", least=0)
    milestones: list[str] = period([], "name=step: times at which the learning rate drops, for example ['50%','75%']")
    gamma: float = knob(0.1, "name=step: factor on the learning rate at each milestone", above=0, most=1)
    args: dict[str, Any] = knob({}, "settings of your own schedule: schedule.args.KEY=VALUE")


@dataclass
class EngineConfig:
    """Training loop: batches, EMA, evaluation and checkpoints."""

    batch_size: int = knob(512, "examples per update, over all ranks and micro-batches", least=1, fixed=True)
    micro_batch_size: int | None = knob(
        None,
        "examples per forward pass (default: batch_size / ranks); mixup and cutmix mix within a micro-batch",
        least=1,
    )
    ema_decay: float = knob(
        0.0, "decay per step of the EMA weights, which are evaluated and saved; 0 disables EMA", least=0, below=1
    )
    eval_split: str = knob(
        "auto",
        "split evaluated during training, which chooses the best checkpoint; auto: val if it exists, else none; "
        "test: as in the published protocol",
        options=("auto", "val", "test", "none"),
    )
    metrics: list[str] = knob(["top1", "top5", "loss"], "metrics computed in evaluation", plugins=METRICS)
    best_by: str = knob("top1", "metric that chooses the best checkpoint, one of engine.metrics", fixed=True)
    eval_every: str = period("1 epoch", "interval between evaluations")
    eval_batch_size: int | None = knob(
        None, "examples per forward pass in evaluation (default: measured on a CPU, 256 on a GPU)", least=1
    )
    save_every: str = period("1 epoch", "interval between checkpoints")
    keep_last: int = knob(2, "number of newest checkpoints to keep", least=1)
    keep_every: str | None = period(None, "additionally keep one checkpoint per interval, permanently")
    stop_after: str | None = period(
        None,
        "end this session at this point of the run, such as '100 steps', and resume later; the schedule stays the same",
    )
    nonfinite: str = knob(
        "abort",
        "response to a gradient with NaN or infinity, which is never applied. abort: end the run; skip: skip the "
        "update; rollback: return to the last checkpoint and continue with a lower learning rate",
        options=("abort", "skip", "rollback"),
    )
    nonfinite_budget: int = knob(
        10, "nonfinite=skip or rollback: number of such gradients before the run aborts", least=0
    )
    rollback_lr_factor: float = knob(
        0.5, "nonfinite=rollback: factor on the learning rate for each rollback", above=0, most=1
    )
    args: dict[str, Any] = knob({}, "settings of your own metrics: engine.args.NAME.KEY=VALUE")


@dataclass
class TrackingConfig:
    """Logging."""

    log_every: int = knob(20, "steps between log rows; the host waits for the device only at these steps", least=1)
    progress: str = knob(
        "auto",
        "console output. bar: progress bar; plain: one line per log row; auto: bar in a terminal, else plain",
        options=("auto", "bar", "plain"),
    )
    loggers: list[str] = knob(["tensorboard"], "loggers in addition to the console and metrics.jsonl", plugins=LOGGERS)
    images: int = knob(16, "number of augmented training images to log, with their mixed labels", least=0)
    mistakes: int = knob(
        16,
        "number of the most confident mistakes that loggers show for each evaluation, with the confusion matrix (up to "
        "1,000 classes); 0: log neither",
        least=0,
    )
    ratios: bool = knob(
        False,
        "log each layer's gradient norm and relative update size; copies the parameters at each log row",
    )
    profile_steps: int = knob(
        0, "number of steps to profile, after three warmup steps; written to trace.json.gz", least=0
    )
    args: dict[str, Any] = knob({}, "settings of loggers: tracking.args.NAME.KEY=VALUE")


@dataclass
class RuntimeConfig:
    """Hardware and numerics."""

    device: str = knob(
        "auto", "auto, cpu, cuda, cuda:N, xpu (Intel) or mps (Apple); auto: an accelerator if there is one"
    )
    precision: str = knob(
        "auto",
        "training precision; auto: on a GPU, bf16 if the hardware supports it, else fp16 on CUDA and fp32 elsewhere; "
        "on a CPU, measured",
        options=PRECISIONS,
    )
    eval_precision: str = knob(
        "fp32", "evaluation precision; in fp32, logits depend on the batch size only by rounding", options=PRECISIONS
    )
    matmul: str = knob(
        "tf32", "precision of fp32 matrix products on CUDA: ieee, or tf32 (10-bit mantissa)", options=("ieee", "tf32")
    )
    attention: str = knob(
        "auto",
        "attention kernel in training: PyTorch's fused one or plain products; auto: measured on a CPU, a rule on a GPU",
        options=KERNELS,
    )
    eval_attention: str = knob(
        "auto", "attention kernel in evaluation; auto: measured on a CPU, a rule on a GPU", options=KERNELS
    )
    stochastic_depth: str = knob(
        "auto",
        "drop residual branches with a mask, or select the samples that keep them and compute only those; auto: "
        "measured on a CPU, a rule on a GPU",
        options=("auto", "mask", "select"),
    )
    channels_last: bool = knob(False, "use the channels_last memory format for images and convolutions")
    compile: Any = knob(
        "auto",
        "use torch.compile. blocks: one graph per kind of block; model: one graph; false: off; "
        "auto: blocks for MOA models on CUDA in runs of 2,000 steps or more, unless runtime.deterministic=true",
    )
    compile_for: str = knob(
        "default",
        "what torch.compile optimizes for (its mode): reduce-overhead launches compiled code as CUDA graphs, which "
        "helps small batches on CUDA; max-autotune also searches for the fastest kernels, which takes minutes",
        options=("default", "reduce-overhead", "max-autotune"),
    )
    deterministic: bool = knob(
        False,
        "use only deterministic kernels, and fixed choices in place of measured ones: runs are reproducible bit for "
        "bit, but slower",
    )
    timeout: float = knob(600.0, "seconds to wait for another rank or for storage before the run fails", above=0)
    threads: Any = knob(
        "auto",
        "CPU threads per rank; auto: CPU cores / ranks on this machine, fewer while other processes use the cores; "
        "deterministic runs do not adapt",
    )
    seed: int = knob(
        0,
        "random seed for data order, augmentation, initialization and dropout",
        least=0,
        most=2**31 - 1,
        fixed=True,
    )


@dataclass
class SweepConfig:
    """Several runs from one command (-m)."""

    dir: str | None = path(
        None,
        "folder of the sweep (default: outputs/sweep-TIME); -m sweep.dir=FOLDER alone continues the sweep in it",
    )
    trials: int = knob(
        0, "number of trials of a search with Optuna, each with all seeds of runtime.seed; 0: run the grid", least=0
    )
    sampler: str = knob("tpe", "how a search chooses the settings of a trial", options=("tpe", "random"))
    pruner: str = knob(
        "median",
        "which trials end early. median: a trial whose score is worse than the median of earlier trials after the same "
        "number of evaluations; halving: all but the best quarter at each of several evaluations; none: no trial",
        options=("median", "halving", "none"),
    )
    startup: int = knob(10, "number of trials that a search draws at random and does not prune", least=1)
    ranks: int = knob(1, "processes of each run, started by torchrun on this machine", least=1)


@dataclass
class RunConfig:
    """Settings of ``moa-train``."""

    run_dir: str | None = path(None, "run folder (default: outputs/DATA-MODEL-TIME)")
    resume: str | None = path(
        None, "run folder to resume; auto: resume run_dir if it contains a checkpoint, else start a new run there"
    )
    replay: int | None = knob(
        None,
        "with resume: repeat the update that follows this step, report NaN and infinity, and save nothing",
        least=0,
    )
    preflight: bool = knob(
        False,
        "check everything and estimate time, memory and disk with a few real steps, an evaluation and a checkpoint, "
        "instead of training",
    )
    init: str | None = path(
        None,
        "weights to start from: run, checkpoint or hub folder, .safetensors file, or .pth file of a torchvision model",
    )
    init_head: str = knob(
        "strict",
        "strict: all weights of init must fit the model; new: reinitialize the classifier",
        options=("strict", "new"),
    )
    code: list[str] = knob(
        [], "your own modules or packages that a checkpoint's configuration may import, for example [my_package]"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


PLACES = tuple(item.name for item in fields(RunConfig) if item.metadata)  # all but the sections
"""Settings that locate a run or control one session of it. A resume takes them from the command line."""


@dataclass
class WeightsConfig:
    """Settings of every command that uses trained weights, which record their model and data set."""

    ckpt: str | None = path(None, "run folder, checkpoint folder, folder of a model hub, or .safetensors file")
    weights: str = knob(
        "auto",
        "weights to use; auto: ema if the checkpoint contains them, else model",
        options=("auto", "model", "ema"),
    )
    batch_size: int | None = knob(
        None, "images per forward pass (default: the run's setting, else 64 on a CPU and 256 on a GPU)", least=1
    )
    workers: int | None = knob(
        None, "processes that decode image files (default: the run's setting, else one per core, at most 8)", least=0
    )
    code: list[str] = knob(
        [], "your own modules or packages that the checkpoint's configuration may import, for example [my_package]"
    )

    def place(self) -> Path:
        """Return ``ckpt`` as a path. Raises UserError if it is not given."""
        if not self.ckpt:
            raise UserError("ckpt is missing. Give ckpt=PATH: a run, checkpoint or hub folder, or a .safetensors file.")
        return Path(self.ckpt)


@dataclass
class EvalConfig(WeightsConfig):
    """Settings of ``moa-eval``."""

    split: str = knob("test", "split to evaluate", options=SPLITS)
    root: str | None = path(None, "folder of the data set, if it is not where it was during training")
    device: str = knob(
        "auto", "auto, cpu, cuda, cuda:N, xpu (Intel) or mps (Apple); auto: an accelerator if there is one"
    )
    precision: str | None = knob(None, "precision (default: runtime.eval_precision of the run)", options=PRECISIONS)
    command: bool = knob(False, "print the commands that produced these weights instead of evaluating them")
    output: str | None = path(
        None,
        "JSON file for the result (default: eval-SPLIT.json or robustness-SPLIT.json in the run folder, or next to a "
        "weights file)",
    )
    tta: str = knob(
        "none",
        "views whose probabilities are averaged; flip: the image and its mirror image; crops: also four corner crops",
        options=("none", "flip", "crops"),
    )
    report: bool = knob(
        False, "also write report-SPLIT.html and .json next to the result; with output=NAME.json: NAME-report.html"
    )
    robustness: list[str] = knob(
        [],
        "evaluate on shifted images instead, and write robustness-SPLIT.html and .json. corruptions: computed from the "
        "split's images; the others: published test sets in benchmarks=FOLDER; all: every set that is available",
        options=(
            "all",
            "corruptions",
            "imagenet-v2",
            "imagenet-a",
            "imagenet-r",
            "imagenet-sketch",
            "imagenet-real",
            "imagenet-c",
            "cifar-10.1",
            "cifar-10-c",
            "cifar-100-c",
        ),
    )
    benchmarks: str | None = path(None, "folder that holds published test sets for robustness, as they are distributed")
    reference: str | None = path(
        None, "robustness-SPLIT.json of another model, to which the mean corruption error is relative"
    )


@dataclass
class ExportConfig(WeightsConfig):
    """Settings of ``moa-export``."""

    format: str = knob(
        "onnx",
        "onnx: for ONNX Runtime; int8: quantized for CPUs, for ONNX Runtime; torch_export: for torch.export.load; "
        "safetensors: one weights file for moa-eval and init=; hub: a folder for a model hub, with a model card",
        options=("onnx", "int8", "torch_export", "safetensors", "hub"),
    )
    output: str | None = path(
        None,
        "file or folder to write, which must not exist yet (default: in export/ in the run folder, or next to a "
        "weights file)",
    )
    split: str = knob("test", "split of the real images that the exported file is checked on", options=SPLITS)
    images: int = knob(10_000, "number of these images, drawn by seed; all if there are fewer", least=1)
    root: str | None = path(None, "folder of the data set, if it is not where it was during training")
    threads: int = knob(0, "CPU threads; 0: as many as there are cores", least=0)
    seed: int = knob(0, "random seed for drawing images", least=0)
    calibration: int = knob(
        256, "format=int8: number of training images, drawn by seed, that determine the ranges of activations", least=16
    )
    max_drop: float = knob(
        0.5,
        "format=int8: largest allowed drop of top-1 accuracy, in percentage points; if it is exceeded, the most "
        "sensitive layers stay in float",
        least=0,
    )
    reduce_range: bool = knob(
        False, "format=int8: 7-bit weights, for x86 CPUs without VNNI, where products of 8-bit numbers can saturate"
    )
    batch_sizes: list[int] = knob([1, 16], "format=int8: batch sizes of the speed measurement", least=1)
    rounds: int = knob(20, "format=int8: number of alternating speed measurements per batch size", least=3)
    license: str | None = knob(
        None, "format=hub, required: license of the weights, such as mit, apache-2.0, cc-by-nc-4.0 or unknown"
    )


@dataclass
class PredictConfig(WeightsConfig):
    """Settings of ``moa-predict``."""

    input: str | None = path(
        None,
        "image file, folder (with its subfolders), pattern such as 'photos/*.jpg', or - to read paths from standard "
        "input, one per line",
    )
    top: int = knob(5, "number of classes per image, most likely first", least=1)
    format: str = knob(
        "table", "table; jsonl: one JSON object per image; csv: one row per class", options=("table", "jsonl", "csv")
    )
    output: str | None = path(None, "file for the predictions (default: standard output)")
    max_pixels: int | None = knob(
        None, "images with more pixels count as unreadable (default: the run's data.max_pixels)", least=1
    )
    max_seconds: float | None = knob(
        None,
        "longest time to decode an image, in seconds; then, the command fails (default: the run's data.max_seconds)",
        above=0,
    )
    range: list[float] | None = knob(
        None, "[LOW,HIGH]: gray levels of black and white in images of more than 8 bits (default: the run's data.range)"
    )
    explain: str | None = path(None, "folder for one PNG per image: class map, and the attention of MOA models")
    explain_class: str | None = knob(None, "explain: class that the class map explains (default: the predicted class)")
    explain_window: list[int] | None = knob(
        None,
        "explain: [row,column] of the window of the first stage whose attention is drawn (default: the window with "
        "the most evidence for the class)",
        least=0,
    )
    explain_checks: int = knob(
        32, "explain: number of images whose class maps are measured by deletion and insertion; 0: none", least=0
    )
    device: str = knob(
        "auto", "auto, cpu, cuda, cuda:N, xpu (Intel) or mps (Apple); auto: an accelerator if there is one"
    )
    precision: str | None = knob(None, "precision (default: runtime.eval_precision of the run)", options=PRECISIONS)


def compile_mode(choice: Any) -> str:
    """Return ``runtime.compile`` as auto, blocks, model or false; true means model."""
    mode = {"true": "model"}.get(str(choice).lower(), str(choice).lower())
    if mode not in COMPILE_MODES:
        raise UserError(choose("runtime.compile", mode, COMPILE_MODES))
    return mode


def thread_count(choice: Any) -> int | None:
    """Return ``runtime.threads`` as a number, or None for auto, for which older versions wrote 0."""
    if choice in ("auto", 0):
        return None
    if not isinstance(choice, int) or isinstance(choice, bool) or choice < 1:
        raise UserError(f"runtime.threads={choice} must be auto or a number of threads, 1 or more.")
    return choice


def image_shape(image_size: Any) -> tuple[int, int]:
    """Return ``data.image_size`` as (height, width), in pixels."""
    sides = image_size if isinstance(image_size, list | tuple) else [image_size, image_size]
    try:
        height, width = map(int, sides)
    except (TypeError, ValueError, OverflowError):
        height = width = 0
    if [height, width] != list(sides) or min(height, width) < 1:
        raise UserError(f"data.image_size={image_size} must be a number of pixels, such as 224, or [height, width].")
    return height, width


def parts(config: Any) -> Iterator[tuple[Plugins, str, dict[str, Any], str]]:
    """Yield ``(kind, name, settings, key of the settings)`` of every exchangeable part that a configuration names."""
    for section in fields(config):
        values: Any = getattr(config, section.name)
        for item in fields(values) if is_dataclass(values) else ():
            kind, named = item.metadata.get("plugins"), getattr(values, item.name)
            if kind is None:
                continue
            if isinstance(named, str):
                yield kind, named, values.args, f"{section.name}.args"
            else:
                for name in named:
                    short = short_name(name)
                    yield kind, name, values.args.get(short, {}), f"{section.name}.args.{short}"


def own_code(config: Any) -> list[str]:
    """Return the import paths of a user's own parts that a configuration names."""
    return [name for _, name, _, _ in parts(config) if is_own_code(name)]
