"""The configuration of a run: every knob, its default, its range and what it does. Documented here and nowhere else.

``RunConfig`` mirrors the groups of ``conf/``. Hydra composes YAML onto it (unknown keys and wrong types are rejected
there), ``validate`` checks ranges, options and rules across fields, and every checkpoint holds the result as JSON.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from moa_train.runtime.errors import UserError, choose, nearest

MODELS = ("moa", "swin", "vit", "resnet")
DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "folder")


def knob(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    options: tuple[str, ...] | None = None,
    fixed: bool = False,
) -> Any:
    """Declare a field: its default, its documentation and the values it may take.

    ``least`` and ``most`` are inclusive bounds, ``above`` and ``below`` exclusive ones; on lists they hold for every
    entry.
    A ``fixed`` knob cannot change when a run goes on: with another value it would be another run.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    rule = {"help": text, **bounds, "options": options, "fixed": fixed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rule)
    return field(default=default, metadata=rule)


@dataclass
class MoaConfig:
    """Multi-resolution overlapped attention between the stages (only read by ``model.name=moa``)."""

    enabled: bool = knob(True, "off: local windows only, the baseline of the paper's table 7", fixed=True)
    form: str = knob(
        "paper",
        "paper: the text's spatial layout; released: number for number the published code",
        options=("paper", "released"),
        fixed=True,
    )
    overlap: int = knob(1, "pixels a side by which keys overlap their neighbours (paper table 5)", least=0, fixed=True)
    reduction: int = knob(32, "channels entering the block are width / reduction (paper table 6)", least=1, fixed=True)
    drop_path: float = knob(0.2, "stochastic depth of the last MOA block; a linear ramp from 0", least=0, most=0.99)


@dataclass
class ModelConfig:
    """Architecture. The baselines read the fields that have a meaning for them."""

    name: str = knob("moa", "architecture", options=MODELS, fixed=True)
    variant: str = knob("custom", "name of the preset, for folders and tables")
    patch_size: int = knob(
        4, "pixels a side of a patch (resnet: 4 is the ImageNet stem, 1 and 2 a 3x3 stem)", least=1, fixed=True
    )
    embed_dim: int = knob(96, "channels of the first stage; doubled by every merging", least=1, fixed=True)
    depths: list[int] = knob([2, 2, 8], "blocks of each stage (vit: one number)", least=0, fixed=True)
    heads: list[int] = knob([3, 6, 12], "attention heads of each stage", least=1, fixed=True)
    window: int = knob(14, "tokens a side of a local window (paper table 4)", least=1, fixed=True)
    mlp_ratio: float = knob(4.0, "hidden width of the MLP over its input's", above=0, fixed=True)
    dropout: float = knob(0.0, "dropout after attention and MLP", least=0, most=0.99)
    drop_path: float = knob(0.1, "stochastic depth of the last local block; a linear ramp from 0", least=0, most=0.99)
    checkpointing: bool = knob(False, "recompute activations in the backward pass: half the memory, a third slower")
    moa: MoaConfig = field(default_factory=MoaConfig)


@dataclass
class DataConfig:
    """Images and labels."""

    name: str = knob("digits", "data set", options=DATASETS, fixed=True)
    root: str | None = knob(None, "folder of the data set (default: data/NAME; imagenet and folder need it)")
    image_size: Any = knob(32, "pixels: one number, or [height, width]", fixed=True)
    download: bool = knob(False, "fetch cifar10 or cifar100 where root does not hold it")
    val_fraction: float = knob(
        0.0, "part of train held out as validation split, 0 to 0.5", least=0, most=0.5, fixed=True
    )
    hold_out: str = knob(
        "position",
        "how val_fraction chooses images of class-folder trees: name, by a hash of the file's name, so that adding or "
        "removing a file moves no other; position, in the sorted list, as in runs of older versions",
        options=("name", "position"),
        fixed=True,
    )
    limit: int | None = knob(None, "train on so many evenly spaced images only (default: all)", least=1, fixed=True)
    workers: int | None = knob(None, "processes a rank that decode files (default: its cores, up to 8)", least=0)
    mean: list[float] | None = knob(None, "channel means in 0..1 (default: the data set's own)", least=0, most=1)
    std: list[float] | None = knob(None, "channel deviations (default: the data set's own)", above=0, most=1)
    unreadable: str = knob(
        "fail",
        "training images that cannot be read: fail, or quarantine: the next readable file takes the place; "
        "in evaluation they are always an error",
        options=("fail", "quarantine"),
    )
    unreadable_budget: int = knob(100, "quarantine: different unreadable files of a rank before it fails", least=0)
    max_pixels: int = knob(100_000_000, "images with more pixels than this are refused as unreadable", least=1)
    range: list[float] | None = knob(
        None,
        "[LOW,HIGH]: gray levels of black and white in images of more than 8 bits per channel (default: the full range "
        "of 16-bit images; floating-point and 32-bit images are refused)",
        fixed=True,
    )
    eval_crop: float = knob(0.875, "evaluation: side of the central crop over the resized image's", above=0, most=1)


@dataclass
class AugmentConfig:
    """What training images go through."""

    crop: str = knob(
        "pad",
        "pad: random crop of the padded image; resized: random resized crop; none",
        options=("pad", "resized", "none"),
    )
    padding: int = knob(4, "pixels a side for crop=pad", least=0)
    scale: list[float] = knob([0.08, 1.0], "crop=resized: range of the area kept", above=0, most=1)
    ratio: list[float] = knob([0.75, 1.3333], "crop=resized: range of width / height", above=0)
    interpolation: str = knob("bicubic", "resampling of files", options=("bilinear", "bicubic"))
    flip: float = knob(0.5, "probability of a horizontal flip", least=0, most=1)
    randaugment_ops: int = knob(0, "RandAugment: operations an image; 0 is off", least=0)
    randaugment_magnitude: float = knob(9.0, "RandAugment: strength, 0 to 10", least=0, most=10)
    randaugment_std: float = knob(0.5, "RandAugment: deviation of the strength", least=0)
    color_jitter: float = knob(0.0, "brightness, contrast and saturation change by up to this factor", least=0, most=1)
    erasing: float = knob(0.0, "probability of random erasing (with pixel noise)", least=0, most=1)
    mixup: float = knob(0.0, "alpha of mixup; 0 is off", least=0)
    cutmix: float = knob(0.0, "alpha of cutmix; 0 is off", least=0)
    mix_prob: float = knob(1.0, "probability that a batch is mixed at all", least=0, most=1)
    mix_switch_prob: float = knob(0.5, "probability of cutmix where both are on", least=0, most=1)
    label_smoothing: float = knob(0.0, "probability mass spread over all classes", least=0, most=0.99)
    repeats: int = knob(1, "repeated augmentation: times an image occurs in an epoch", least=1, fixed=True)
    off: str = knob("0%", "last part of the run without RandAugment, jitter, erasing and mixing: 10 epochs, 5%, ...")


@dataclass
class OptimConfig:
    """The update."""

    name: str = knob("adamw", "optimizer", options=("adamw", "nadamw", "sgd", "muon"), fixed=True)
    lr: float = knob(9e-4, "peak rate for a batch of lr_batch examples", above=0)
    lr_scaling: str = knob("linear", "how the rate follows the global batch", options=("linear", "sqrt", "none"))
    lr_batch: int = knob(512, "the batch that lr, min_lr and warmup_lr are given for", least=1)
    weight_decay: float = knob(0.05, "decoupled decay; never on biases, 1-D parameters and position tables", least=0)
    betas: list[float] = knob([0.9, 0.999], "AdamW: decay of the two moments", least=0, below=1)
    eps: float = knob(1e-8, "AdamW: term in the denominator", above=0)
    momentum: float = knob(0.9, "SGD and Muon", least=0, below=1)
    clip: str = knob("norm", "gradient clipping", options=("norm", "value", "none"))
    clip_value: float = knob(5.0, "largest norm of all gradients, or largest absolute value", above=0)


@dataclass
class ScheduleConfig:
    """The rate, a pure function of the step. Durations: 300 epochs, 5000 steps, 1e6 examples, 5% of the run."""

    name: str = knob("cosine", "shape after the warm-up", options=("cosine", "linear", "step", "constant"))
    duration: str = knob("300 epochs", "length of the run")
    warmup: str = knob("20 epochs", "linear warm-up, inside the duration")
    warmup_lr: float = knob(9e-7, "rate of the first step, for a batch of optim.lr_batch", least=0)
    min_lr: float = knob(5e-6, "floor, for a batch of optim.lr_batch", least=0)
    milestones: list[str] = knob([], "step: when the rate falls")
    gamma: float = knob(0.1, "step: factor at a milestone", above=0, most=1)


@dataclass
class EngineConfig:
    """The loop: batches, averaging, evaluation, checkpoints."""

    batch_size: int = knob(512, "examples of one update, over all ranks and micro-batches", least=1, fixed=True)
    micro_batch_size: int | None = knob(
        None, "examples of one forward pass (default: batch_size / ranks); also the unit of mixing", least=1
    )
    ema_decay: float = knob(
        0.0, "averaged weights: decay a step, 0 is off; evaluated and saved when on", least=0, below=1
    )
    eval_split: str = knob(
        "auto",
        "split evaluated during training, whose best checkpoint is kept: auto is val where there is one; "
        "test is the published protocol, to be asked for",
        options=("auto", "val", "test", "none"),
    )
    eval_every: str = knob("1 epoch", "distance of evaluations")
    eval_batch_size: int | None = knob(
        None, "examples of one forward pass in evaluation (default: 256; on a CPU 64, which takes less memory)", least=1
    )
    save_every: str = knob("1 epoch", "distance of checkpoints")
    keep_last: int = knob(2, "newest checkpoints kept", least=1)
    keep_every: str | None = knob(None, "also keep one checkpoint in each of these distances for ever")
    stop_after: str | None = knob(None, "end the session here, resumable, the schedule untouched: '100 steps'")
    nonfinite: str = knob(
        "abort",
        "what follows a gradient that is not finite, which is never applied: abort; skip the update; rollback to the "
        "last checkpoint and go on from there at a lower rate",
        options=("abort", "skip", "rollback"),
    )
    nonfinite_budget: int = knob(10, "skip and rollback: times it may happen before the run is aborted", least=0)
    rollback_rate: float = knob(0.5, "rollback: factor on the rate from there on, each time", above=0, most=1)


@dataclass
class TrackingConfig:
    """What is written while training."""

    log_every: int = knob(20, "steps between log rows; the only place where the host waits for the device", least=1)
    progress: str = knob("auto", "bar: redrawn line; plain: lines; auto: by terminal", options=("auto", "bar", "plain"))
    tensorboard: bool = knob(True, "write TensorBoard events")
    images: int = knob(16, "augmented training images shown in TensorBoard", least=0)
    profile_steps: int = knob(0, "steps traced into trace.json.gz, after three of warm-up; 0 is off", least=0)


@dataclass
class RuntimeConfig:
    """Hardware and numbers."""

    device: str = knob("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where it is")
    precision: str = knob(
        "auto", "training: auto is bf16 where the hardware has it", options=("auto", "bf16", "fp16", "fp32")
    )
    eval_precision: str = knob(
        "fp32",
        "evaluation: fp32 gives the same counts at any batch size",
        options=("auto", "bf16", "fp16", "fp32"),
    )
    matmul: str = knob("tf32", "fp32 products on CUDA: ieee, or tf32 (10-bit mantissa)", options=("ieee", "tf32"))
    channels_last: bool = knob(False, "memory layout of images and convolutions")
    compile: bool = knob(False, "torch.compile the model: minutes at the start, faster steps on CUDA")
    deterministic: bool = knob(False, "deterministic kernels only: bit-identical repeats, slower on CUDA")
    timeout: float = knob(600.0, "seconds to wait for another rank before the run ends", above=0)
    threads: int = knob(0, "CPU threads a rank; 0: cores / ranks on this machine", least=0)
    seed: int = knob(0, "of order, augmentation, initialisation and dropout", least=0, most=2**31 - 1, fixed=True)


@dataclass
class RunConfig:
    """A whole run."""

    run_dir: str | None = knob(None, "run folder (default: outputs/DATA-MODEL-TIME)")
    resume: str | None = knob(None, "a run folder to go on with, or auto: go on in run_dir where it holds a checkpoint")
    replay: int | None = knob(
        None, "with resume: repeat the update after so many and look for what is not finite; nothing is saved", least=0
    )
    init: str | None = knob(None, "weights to start from: run folder, checkpoint folder or .safetensors")
    init_head: str = knob(
        "strict", "strict: init must fit; new: start the classifier afresh", options=("strict", "new")
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass
class EvalConfig:
    """What ``moa-eval`` takes; model and data are rebuilt from what the checkpoint says of itself."""

    ckpt: str | None = knob(None, "run folder, checkpoint folder or .safetensors file")
    weights: str = knob("auto", "auto: averaged weights where there are any", options=("auto", "model", "ema"))
    split: str = knob("test", "split to evaluate", options=("train", "val", "test"))
    root: str | None = knob(None, "folder of the data set, where it has moved")
    batch_size: int | None = knob(None, "examples of one forward pass (default: as in training)", least=1)
    workers: int | None = knob(None, "processes that decode files (default: as in training)", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    precision: str | None = knob(
        None, "default: runtime.eval_precision of the run", options=("auto", "bf16", "fp16", "fp32")
    )
    command: bool = knob(False, "print the commands that made these weights, and evaluate nothing")
    output: str | None = knob(None, "JSON file for the result (default: eval-SPLIT.json beside the weights)")


def knobs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(dotted key, field, value)`` of every knob below a configuration object or class."""
    for item in fields(config):
        key = prefix + item.name
        value = getattr(config, item.name, None)
        if is_dataclass(value):
            yield from knobs(value, key + ".")
        else:
            yield key, item, value


def image_shape(image_size: Any) -> tuple[int, int]:
    """Return ``data.image_size`` as (height, width), in pixels."""
    height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
    return int(height), int(width)


def validate(config: Any) -> None:
    """Check ranges, options and the rules across fields of a ``RunConfig`` or ``EvalConfig``.

    Raises:
        UserError: naming the key, the value and what would be right.
    """
    for key, item, value in knobs(config):
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            _check_entry(key, entry, item.metadata)
    if isinstance(config, RunConfig):
        _check_rules(config)


def _check_entry(key: str, value: Any, rule: Any) -> None:
    if value is None:
        return
    if rule["options"] and value not in rule["options"]:
        raise UserError(choose(key, value, rule["options"]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = [(sign, rule[name]) for name, sign in _SIGNS.items() if rule[name] is not None]
    if not math.isfinite(value) or not all(_HOLDS[sign](value, bound) for sign, bound in bounds):
        rules = [f"{sign} {bound}" for sign, bound in bounds] or ["finite"]
        raise UserError(f"{key}={value} is out of range: it must be {' and '.join(rules)}.")


_SIGNS = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
_HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def _check_rules(config: RunConfig) -> None:
    data, augment, optim, engine = config.data, config.augment, config.optim, config.engine
    try:
        height, width = image_shape(data.image_size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise UserError(f"data.image_size={data.image_size} must be a number of pixels or [height, width].")
    if data.name in ("imagenet", "folder") and not data.root:
        raise UserError(f"data={data.name} needs data.root=FOLDER, the folder that holds train/ and val/ (or test/).")
    if data.download and data.name not in ("cifar10", "cifar100"):
        raise UserError(f"data.download=true: {data.name} is never downloaded. Set data.root to your copy.")
    for key, entries, length in (
        ("augment.scale", augment.scale, 2),
        ("augment.ratio", augment.ratio, 2),
        ("optim.betas", optim.betas, 2),
        ("data.range", data.range, 2),
        ("data.mean", data.mean, 3),
        ("data.std", data.std, 3),
    ):
        if entries is not None and len(entries) != length:
            raise UserError(f"{key}={entries} must have {length} entries.")
        if entries and key.startswith(("augment", "data.range")) and entries[0] > entries[1]:
            raise UserError(f"{key}={entries}: the lower end exceeds the upper one.")
    micro = engine.micro_batch_size
    if micro and engine.batch_size % micro:
        raise UserError(
            f"engine.batch_size={engine.batch_size} is not a multiple of engine.micro_batch_size={micro}. "
            f"Nearest batch sizes that are: {_multiples_near(engine.batch_size, micro)}."
        )
    if engine.eval_split == "val" and data.val_fraction == 0 and data.name != "folder":
        raise UserError(
            f"engine.eval_split=val, but {data.name} has no validation split. Hold one out (data.val_fraction=0.1), "
            "or ask for the published protocol (engine.eval_split=test)."
        )
    if config.schedule.name == "step" and not config.schedule.milestones:
        raise UserError("schedule=step needs schedule.milestones, for example ['50%','75%'].")
    if config.resume not in (None, "auto") and config.init:
        raise UserError("resume goes on with a run, init starts a new one from weights: give one of the two.")
    if config.init_head != "strict" and not config.init:
        raise UserError(f"init_head={config.init_head} is about the weights of init=, which is not given.")
    if config.replay is not None and config.resume in (None, "auto"):
        raise UserError(f"replay={config.replay} needs resume=FOLDER, the run whose update is to be repeated.")
    if config.resume == "auto" and not config.run_dir:
        raise UserError("resume=auto needs run_dir=FOLDER, or every start would be a new folder.")


def _multiples_near(value: int, unit: int) -> str:
    low, high = value // unit * unit, -(-value // unit) * unit
    return " or ".join(str(number) for number in (low, high) if number)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, lists and scalars (JSON)."""
    return asdict(config)


def from_dict(values: dict[str, Any], kind: type = RunConfig, prefix: str = "") -> Any:
    """Rebuild a configuration from ``to_dict``'s output.

    Raises:
        UserError: at keys that this version does not know. Missing keys take their default.
    """
    if not isinstance(values, dict):
        raise UserError(f"The configuration{f' at {prefix[:-1]}' if prefix else ''} is {values!r:.80}, not a section.")
    known = {item.name: item for item in fields(kind)}
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"Unknown configuration key {prefix}{key}.{nearest(key, known)}")
        nested = is_dataclass(hints[key]) and isinstance(hints[key], type)
        arguments[key] = from_dict(value, hints[key], f"{prefix}{key}.") if nested else value
    return kind(**arguments)
