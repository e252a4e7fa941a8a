"""The stages of a MOA-Transformer in numbers, and checks of a model's settings before anything is built."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moa_train.runtime.errors import UserError
from moa_train.schema import MoaConfig, ModelConfig


@dataclass(frozen=True)
class StagePlan:
    """One stage: its map, its windows, and whether a MOA block ends it."""

    index: int  # counted from 0, as in depths[0]
    map_size: tuple[int, int]  # height, width in positions
    dim: int  # channels
    depth: int  # local blocks
    heads: int
    window: int  # side of a window, at most that of the map
    moa: bool

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows, including those that extend into the padding."""
        return -(-self.map_size[0] // self.window), -(-self.map_size[1] // self.window)

    def __str__(self) -> str:
        return f"Stage {self.index} (map {self.map_size[0]} x {self.map_size[1]}, {self.dim} channels)"


def plan_stages(config: ModelConfig, image_size: tuple[int, int]) -> list[StagePlan]:
    """Plan the stages of a MOA-Transformer for images of ``image_size`` = (height, width) pixels.

    Raises:
        UserError: these settings do not fit together. The message names the nearest ones that do.
    """
    depths, heads, window, moa = config.depths, config.heads, config.window, config.moa
    check_image(image_size, config.patch_size)
    check_lists(depths, heads)
    check_mlp(config)
    _check_conv(config)
    stages = [
        StagePlan(
            index=index,
            map_size=map_size,
            dim=config.embed_dim * 2**index,
            depth=depths[index],
            heads=heads[index],
            window=min(window, *map_size),
            moa=moa.enabled and index < len(depths) - 1 and min(map_size) >= window,
        )
        for index, map_size in enumerate(stage_maps(image_size, config.patch_size, len(depths)))
    ]
    for before in stages[:-1]:
        _check_merging(before)
    for stage in stages:
        check_heads(str(stage), stage.dim, stage.heads)
        if stage.moa:
            _check_moa(stage, moa)
    if moa.form == "published":
        _check_published(image_size, config.patch_size, len(depths), window)
    return stages


def stage_maps(image_size: tuple[int, int], patch_size: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of every stage's map: padded to whole patches, halved and rounded up by each merging."""
    height, width = (-(-side // patch_size) for side in image_size)
    for _ in range(count):
        yield height, width
        height, width = -(-height // 2), -(-width // 2)


def nearest_divisors(number: int, wanted: int) -> str:
    """List the three divisors of ``number`` that are closest to ``wanted``, in order of size."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda divisor: abs(divisor - wanted))[:3])))


def check_image(image_size: tuple[int, int], patch_size: int) -> None:
    """Raise `UserError` if the image is smaller than a patch."""
    if min(image_size) < patch_size:
        raise UserError(
            f"image_size={image_size[0]} x {image_size[1]} is smaller than a patch of {patch_size} x {patch_size}: "
            f"use patch_size <= {min(image_size)}, or larger images."
        )


def check_lists(depths: Sequence[int], heads: Sequence[int]) -> None:
    """Raise `UserError` unless depths and heads describe the same number of stages."""
    if len(depths) != len(heads) or not depths:
        raise UserError(
            f"depths={list(depths)} has {len(depths)} stages and heads={list(heads)} has {len(heads)}: "
            "give both one entry per stage, for at least one stage."
        )


def check_mlp(config: ModelConfig) -> None:
    """Raise `UserError` if the hidden layers of the MLPs would have no channels."""
    if int(config.mlp_ratio * config.embed_dim) < 1:
        raise UserError(f"mlp_ratio={config.mlp_ratio} leaves the MLP no channels.")


def _check_conv(config: ModelConfig) -> None:
    patch = config.patch_size
    if "stem" in config.conv and (patch < 2 or patch & (patch - 1)):
        raise UserError(f"model.conv=[stem] halves the image repeatedly: patch_size={patch} must be 2, 4, 8 or 16.")
    if "stem" in config.conv and config.embed_dim < patch // 2:
        raise UserError(
            f"model.conv=[stem] halves the channels toward the image: embed_dim={config.embed_dim} must be at least "
            f"half of patch_size={patch}."
        )
    if config.stem_blocks and "stem" not in config.conv:
        raise UserError(f"model.stem_blocks={config.stem_blocks} needs a convolutional stem: add stem to model.conv.")
    if config.conv and config.moa.form == "published":
        raise UserError(
            f"model.conv={list(config.conv)} changes the published architecture. Use model.moa.form=paper, or conv=[]."
        )


def check_heads(where: str, dim: int, heads: int) -> None:
    """Raise `UserError` unless the heads divide the channels."""
    if heads < 1 or dim % heads:
        raise UserError(
            f"{where}: heads={heads} does not divide {dim} channels. "
            f"Nearest numbers that do: {nearest_divisors(dim, heads)}."
        )


def _check_merging(before: StagePlan) -> None:
    if max(before.map_size) == 1:
        raise UserError(
            f"{before}: a single position cannot be merged for another stage. Use at most {before.index + 1} stages "
            "(entries of depths and heads), a smaller patch_size or larger images."
        )


def _check_moa(stage: StagePlan, moa: MoaConfig) -> None:
    overlap, reduction = moa.overlap, moa.reduction
    if moa.form == "paper" and stage.dim % reduction:
        raise UserError(
            f"{stage}: moa.reduction={reduction} does not divide its channels. "
            f"Nearest reductions that do: {nearest_divisors(stage.dim, reduction)}."
        )
    if reduction > stage.dim:
        raise UserError(
            f"{stage}: moa.reduction={reduction} leaves no channels. The largest value that does: {stage.dim}."
        )
    if overlap > stage.window:
        raise UserError(
            f"{stage}: moa.overlap={overlap} exceeds the window of {stage.window}: keys may extend into neighboring "
            f"windows, not beyond them. Use 0 to {stage.window}."
        )


def _check_published(image_size: tuple[int, int], patch_size: int, count: int, window: int) -> None:
    """Raise `UserError` unless all maps divide: the published form reinterprets memory, so it cannot pad."""
    if _divides(image_size, patch_size, count, window):
        return
    height, width = image_size
    fitting = [
        side for side in range(patch_size, 4 * max(image_size)) if _divides((side, side), patch_size, count, window)
    ]
    nearest_sides = sorted(sorted(fitting, key=lambda side: abs(side - max(height, width)))[:3])
    maps = ", ".join(f"{h} x {w}" for h, w in stage_maps(image_size, patch_size, count))
    raise UserError(
        f"model.moa.form=published cannot pad: image_size={height} x {width} and patch_size={patch_size} give maps of "
        f"{maps}, which must all divide into windows of {window}, and all but the last must have even sides. "
        f"Nearest sizes that do: {', '.join(map(str, nearest_sides)) or 'none'}. model.moa.form=paper accepts any size."
    )


def _divides(image_size: tuple[int, int], patch_size: int, count: int, window: int) -> bool:
    if any(side % patch_size for side in image_size):
        return False
    maps = list(stage_maps(image_size, patch_size, count))
    even = all(side % 2 == 0 for map_size in maps[:-1] for side in map_size)
    return even and all(side % min(window, *map_size) == 0 for map_size in maps for side in map_size)


def check_patches(image_size: tuple[int, int], patch_size: int, name: str) -> None:
    """Raise `UserError` unless the image divides into patches."""
    check_image(image_size, patch_size)
    for side in image_size:
        if side % patch_size:
            low = side // patch_size * patch_size
            raise UserError(
                f"model.name={name} needs images that divide into patches: {side} pixels, patch_size={patch_size}. "
                f"Nearest sizes that do: {low}, {low + patch_size}; "
                f"nearest patches: {nearest_divisors(side, patch_size)}."
            )
