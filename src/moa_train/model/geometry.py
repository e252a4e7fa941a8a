"""What a model looks like in numbers, worked out and checked before anything is built."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moa_train.runtime.errors import UserError, choose

FORMS = ("paper", "released")


@dataclass(frozen=True)
class Stage:
    """One stage: its map, its windows, and whether a MOA block ends it."""

    index: int  # counted from 0, as in depths[0]
    map_size: tuple[int, int]  # height, width in positions
    dim: int  # channels
    depth: int  # local blocks
    heads: int
    window: int  # side of a window, cut to the map
    moa: bool

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows, those that reach into the padding included."""
        return -(-self.map_size[0] // self.window), -(-self.map_size[1] // self.window)

    def __str__(self) -> str:
        return f"Stage {self.index} (map {self.map_size[0]} x {self.map_size[1]}, {self.dim} channels)"


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
    """Work out the stages of a MOA-Transformer; `UserError` for what cannot be built, with the nearest that can."""
    _check_least(1, patch_size=patch_size, embed_dim=embed_dim, window=window, moa_reduction=moa_reduction)
    _check_least(0, moa_overlap=moa_overlap)
    _check_image(image_size, patch_size)
    _check_lists(depths, heads)
    if moa_form not in FORMS:
        raise UserError(choose("moa.form", moa_form, FORMS))
    stages = [
        Stage(
            index=index,
            map_size=map_size,
            dim=embed_dim * 2**index,
            depth=depths[index],
            heads=heads[index],
            window=min(window, *map_size),
            moa=moa_enabled and index < len(depths) - 1 and min(map_size) >= window,
        )
        for index, map_size in enumerate(stage_maps(image_size, patch_size, len(depths)))
    ]
    for before in stages[:-1]:
        _check_merging(before)
    for stage in stages:
        _check_stage(stage)
        if stage.moa:
            _check_moa(stage, moa_form, moa_overlap, moa_reduction)
    if moa_form == "released":
        _check_released(image_size, patch_size, len(depths), window)
    return stages


def stage_maps(image_size: tuple[int, int], patch_size: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of every stage's map: padded to whole patches, halved and rounded up by each merging."""
    height, width = (-(-side // patch_size) for side in image_size)
    for _ in range(count):
        yield height, width
        height, width = -(-height // 2), -(-width // 2)


def check(name: str, **fields: Any) -> None:
    """Check the fields of `create_model` for one of its models; raise `UserError` where they do not fit together."""
    _check_least(1, num_classes=fields["num_classes"], in_channels=fields["in_channels"])
    for rate in ("drop_path", "dropout", "moa_drop_path"):
        if not 0 <= fields[rate] < 1:
            raise UserError(f"{rate}={fields[rate]} must be at least 0 and below 1.")
    if int(fields["mlp_ratio"] * fields["embed_dim"]) < 1:
        raise UserError(f"mlp_ratio={fields['mlp_ratio']} leaves the MLP no channel.")
    if name == "moa":
        moa = ("moa_enabled", "moa_form", "moa_overlap", "moa_reduction")
        common = ("image_size", "patch_size", "embed_dim", "depths", "heads", "window")
        plan_stages(**{key: fields[key] for key in (*common, *moa)})
    else:
        {"swin": _check_swin, "vit": _check_vit, "resnet": _check_resnet}[name](fields)


def nearest_divisors(number: int, wanted: int, count: int = 3) -> str:
    """List the divisors of ``number`` that are closest to ``wanted``, in order of size."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda divisor: abs(divisor - wanted))[:count])))


def _check_least(least: int, **fields: int) -> None:
    for name, value in fields.items():
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}.")


def _check_image(image_size: tuple[int, int], patch_size: int) -> None:
    if min(image_size) < patch_size:
        raise UserError(
            f"image_size={image_size[0]} x {image_size[1]} is smaller than a patch of {patch_size} x {patch_size}: "
            f"use patch_size <= {min(image_size)}, or larger images."
        )


def _check_lists(depths: Sequence[int], heads: Sequence[int]) -> None:
    if len(depths) != len(heads) or not depths:
        raise UserError(
            f"depths={list(depths)} has {len(depths)} stages and heads={list(heads)} has {len(heads)}: "
            "give both one entry a stage, for at least one stage."
        )


def _check_heads(where: str, dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise UserError(
            f"{where}: heads={heads} does not divide {dim} channels. "
            f"Nearest numbers of heads that do: {nearest_divisors(dim, heads)}."
        )


def _check_stage(stage: Stage) -> None:
    if stage.depth < 1:
        raise UserError(f"{stage}: depths[{stage.index}]={stage.depth} must be at least 1.")
    _check_heads(str(stage), stage.dim, stage.heads)


def _check_merging(before: Stage) -> None:
    if max(before.map_size) == 1:
        raise UserError(
            f"{before}: a single position cannot be merged for another stage. Use at most {before.index + 1} stages "
            "(entries of depths and heads), a smaller patch_size or larger images."
        )


def _check_moa(stage: Stage, form: str, overlap: int, reduction: int) -> None:
    if form == "paper" and stage.dim % reduction:
        raise UserError(
            f"{stage}: moa.reduction={reduction} does not divide its channels. "
            f"Nearest reductions that do: {nearest_divisors(stage.dim, reduction)}."
        )
    if reduction > stage.dim:
        raise UserError(f"{stage}: moa.reduction={reduction} leaves no channel. The largest that does: {stage.dim}.")
    if overlap > stage.window:
        raise UserError(
            f"{stage}: moa.overlap={overlap} exceeds the window of {stage.window}: keys may reach into neighbouring "
            f"windows, not beyond them. Use 0 to {stage.window}."
        )


def _check_released(image_size: tuple[int, int], patch_size: int, count: int, window: int) -> None:
    """The published form reinterprets memory, so it cannot pad: every map must divide."""
    if _divides(image_size, patch_size, count, window):
        return
    height, width = image_size
    fitting = [
        side for side in range(patch_size, 4 * max(image_size)) if _divides((side, side), patch_size, count, window)
    ]
    nearest_sides = sorted(sorted(fitting, key=lambda side: abs(side - max(height, width)))[:3])
    maps = ", ".join(f"{h} x {w}" for h, w in stage_maps(image_size, patch_size, count))
    raise UserError(
        f"moa.form=released cannot pad: image_size={height} x {width} with patch_size={patch_size} gives maps of "
        f"{maps}, which must all divide into windows of {window} and, but for the last, be even. "
        f"Nearest sizes that do: {', '.join(map(str, nearest_sides)) or 'none'}. moa.form=paper takes any size."
    )


def _divides(image_size: tuple[int, int], patch_size: int, count: int, window: int) -> bool:
    if any(side % patch_size for side in image_size):
        return False
    maps = list(stage_maps(image_size, patch_size, count))
    even = all(side % 2 == 0 for map_size in maps[:-1] for side in map_size)
    return even and all(side % min(window, *map_size) == 0 for map_size in maps for side in map_size)


def _check_patches(image_size: tuple[int, int], patch_size: int, name: str) -> None:
    _check_image(image_size, patch_size)
    for side in image_size:
        if side % patch_size:
            low = side // patch_size * patch_size
            raise UserError(
                f"model.name={name} needs images that divide into patches: {side} pixels, patch_size={patch_size}. "
                f"Nearest sizes that do: {low}, {low + patch_size}; "
                f"nearest patches: {nearest_divisors(side, patch_size)}."
            )


def _check_swin(fields: dict[str, Any]) -> None:
    depths, heads = fields["depths"], fields["heads"]
    _check_least(1, patch_size=fields["patch_size"], embed_dim=fields["embed_dim"], window=fields["window"])
    _check_patches(fields["image_size"], fields["patch_size"], "swin")
    _check_lists(depths, heads)
    if sum(depths) == 1:
        raise UserError("depths=[1]: torchvision's Swin needs at least two blocks. Use depths=[2] or more stages.")
    for index, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        _check_least(1, **{f"depths[{index}]": depth})
        _check_heads(f"Stage {index}", fields["embed_dim"] * 2**index, count)


def _check_vit(fields: dict[str, Any]) -> None:
    _check_least(1, patch_size=fields["patch_size"], embed_dim=fields["embed_dim"])
    _check_patches(fields["image_size"], fields["patch_size"], "vit")
    _check_lists(fields["depths"], fields["heads"])
    if len(fields["depths"]) != 1:
        raise UserError(f"model.name=vit has one stage: depths={list(fields['depths'])} must have one entry, as [12].")
    _check_least(1, **{"depths[0]": fields["depths"][0]})
    _check_heads("vit", fields["embed_dim"], fields["heads"][0])
    if fields["drop_path"]:
        raise UserError(f"drop_path={fields['drop_path']}: torchvision's ViT has no stochastic depth; set it to 0.")


def _check_resnet(fields: dict[str, Any]) -> None:
    if fields["patch_size"] not in (1, 2, 4):
        raise UserError(f"patch_size={fields['patch_size']}: resnet has stems for 1, 2 (small images) and 4.")
    if len(fields["depths"]) != 4 or min(fields["depths"]) < 1:
        raise UserError(f"model.name=resnet has four stages: depths={list(fields['depths'])}, not like [3, 4, 6, 3].")
    if fields["embed_dim"] != 64:
        raise UserError(f"embed_dim={fields['embed_dim']}: the first stage of resnet has 64 channels; set it to 64.")
    for rate in ("drop_path", "dropout"):
        if fields[rate]:
            raise UserError(f"{rate}={fields[rate]}: torchvision's ResNet has none; set it to 0.")
