"""What a model of windows looks like, worked out and checked before anything is built."""

from collections.abc import Sequence
from dataclasses import dataclass

from moa_train.runtime.errors import UserError, choose


@dataclass(frozen=True)
class Stage:
    """One stage: its map, its windows, and whether a MOA block ends it."""

    index: int  # counted from 0
    map_size: tuple[int, int]  # height, width in positions
    dim: int  # channels
    depth: int  # local blocks
    heads: int
    window: int  # side of a window, cut to the map
    moa: bool

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows, the padded ones included."""
        return -(-self.map_size[0] // self.window), -(-self.map_size[1] // self.window)

    def __str__(self) -> str:
        return f"stage {self.index} (map {self.map_size[0]} x {self.map_size[1]}, {self.dim} channels)"


def plan_stages(
    *,
    image_size: tuple[int, int],
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    heads: Sequence[int],
    window: int,
    moa_enabled: bool = True,
    moa_form: str = "paper",
    moa_overlap: int = 1,
    moa_reduction: int = 32,
) -> list[Stage]:
    """Work the stages out; raise `UserError` for what cannot be built, with the nearest values that can."""
    _at_least_one(patch_size=patch_size, embed_dim=embed_dim, window=window, moa_reduction=moa_reduction)
    check_image(image_size, patch_size)
    if len(depths) != len(heads) or not depths:
        raise UserError(
            f"depths={list(depths)} and heads={list(heads)} must name the same stages, at least one: "
            f"got {len(depths)} and {len(heads)} of them."
        )
    if moa_form not in ("paper", "released"):
        raise UserError(choose("moa.form", moa_form, ("paper", "released")))
    stages: list[Stage] = []
    height, width = (-(-side // patch_size) for side in image_size)
    for index, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        if index:
            _check_merging(stages[-1])
            height, width = -(-height // 2), -(-width // 2)
        last = index == len(depths) - 1
        stage = Stage(
            index=index,
            map_size=(height, width),
            dim=embed_dim * 2**index,
            depth=depth,
            heads=count,
            window=min(window, height, width),
            moa=moa_enabled and not last and min(height, width) >= window,
        )
        _check_blocks(stage)
        if stage.moa:
            _check_moa(stage, moa_form, moa_overlap, moa_reduction)
        if moa_form == "released":
            _check_released(stage, last)
        stages.append(stage)
    return stages


def check_image(image_size: tuple[int, int], patch_size: int) -> None:
    """Refuse images that are smaller than one patch."""
    if min(image_size) < patch_size:
        raise UserError(
            f"image_size={image_size[0]} x {image_size[1]} is smaller than one patch of {patch_size} x {patch_size}: "
            f"use patch_size <= {min(image_size)} or larger images."
        )


def check_heads(where: str, dim: int, heads: int) -> None:
    """Refuse a number of heads that does not divide the width."""
    if heads < 1 or dim % heads:
        raise UserError(
            f"{where}: heads={heads} does not divide its {dim} channels. "
            f"Nearest numbers of heads that do: {nearest_divisors(dim, heads)}."
        )


def nearest_divisors(number: int, wanted: int, count: int = 3) -> str:
    """List the divisors of ``number`` that are closest to ``wanted``, in order of size."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:count])))


def _at_least_one(**fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")


def _check_blocks(stage: Stage) -> None:
    if stage.depth < 1:
        raise UserError(f"{stage}: depths[{stage.index}]={stage.depth} must be at least 1.")
    check_heads(str(stage), stage.dim, stage.heads)


def _check_merging(stage: Stage) -> None:
    if max(stage.map_size) == 1:
        raise UserError(
            f"{stage}: a map of one position cannot be merged for a stage {stage.index + 1}. "
            f"Use at most {stage.index + 1} stages (depths and heads), a smaller patch_size or larger images."
        )


def _check_moa(stage: Stage, form: str, overlap: int, reduction: int) -> None:
    if form == "paper" and stage.dim % reduction:
        raise UserError(
            f"{stage}: moa.reduction={reduction} does not divide its channels. "
            f"Nearest reductions that do: {nearest_divisors(stage.dim, reduction)}."
        )
    if reduction > stage.dim:
        raise UserError(f"{stage}: moa.reduction={reduction} leaves no channel; at most {stage.dim} works.")
    if not 0 <= overlap <= stage.window:
        raise UserError(
            f"{stage}: moa.overlap={overlap} must lie between 0 and the window, {stage.window}: "
            "keys reach into neighbouring windows, not beyond them."
        )


def _check_released(stage: Stage, last: bool) -> None:
    height, width = stage.map_size
    if height % stage.window or width % stage.window or (not last and (height % 2 or width % 2)):
        raise UserError(
            f"{stage}: moa.form=released reinterprets memory and cannot pad: the map must divide into windows of "
            f"{stage.window} x {stage.window}" + ("." if last else " and be even.") + " Use image sizes that are "
            "multiples of patch_size x window x 2^(stages - 1), or moa.form=paper."
        )
