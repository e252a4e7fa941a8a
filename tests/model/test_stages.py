"""For any geometry, either the model runs with finite outputs and gradients, or a correct error comes first."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train.model.registry import check_model, create_model
from moa_train.model.stages import StagePlan, nearest_divisors, plan_stages
from moa_train.runtime.errors import UserError

FLAWS = ("heads", "reduction", "overlap", "patch", "merged")


@st.composite
def geometries(draw: st.DrawFn) -> dict:
    """Draw settings that usually fit together; some have a flaw. Sides are drawn as maps, then converted to pixels."""
    flaw = draw(st.sampled_from([None] * 12 + list(FLAWS)))
    form = draw(st.sampled_from(["paper", "paper", "published"]))
    count, patch, window = (draw(st.sampled_from(range(1, most + 1))) for most in (5, 16, 9))
    if form == "published":  # it usually needs sizes that divide
        factors = [factor for factor in (1, 2, window, 2 * window) if factor * 2 ** (count - 1) <= 40]
        sides = [draw(st.sampled_from([factor * 2 ** (count - 1) for factor in factors])) * patch for _ in range(2)]
    else:
        positions = range(2 ** max(count - 2, 0) + 1, max(20, 2**count))
        sides = [draw(st.sampled_from(positions)) * patch - draw(st.sampled_from(range(patch))) for _ in range(2)]
    if flaw == "patch":
        sides[draw(st.sampled_from((0, 1)))] = patch - 1 or 1
    if flaw == "merged":
        sides = [patch, patch]
    reductions = [3, 5, 16, 32] if flaw == "reduction" else [1, 2, 4, 8]
    heads = [draw(st.sampled_from([1, 2, 4, 8])) for _ in range(count)]
    if flaw == "heads":
        heads[draw(st.sampled_from(range(count)))] = draw(st.sampled_from([0, 5, 7, 13]))
    return {
        "image_size": tuple(sides),
        "patch_size": patch,
        "embed_dim": draw(st.sampled_from([8, 16, 24])),
        "depths": tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(count)),
        "heads": tuple(heads),
        "window": window,
        "moa_enabled": draw(st.sampled_from([True, True, True, True, False])),
        "moa_form": form,
        "moa_overlap": draw(st.sampled_from(range(3, 13) if flaw == "overlap" else range(min(2, window) + 1))),
        "moa_reduction": draw(st.sampled_from(reductions)),
    }


def why_not(fields: dict) -> str | None:
    """Return a word that the error must contain, by independently written rules, or None if the model must run."""
    (height, width), patch, window, count = (fields[key] for key in ("image_size", "patch_size", "window", "depths"))
    count = len(count)
    if min(height, width) < patch:
        return "patch"
    maps = [(math.ceil(height / patch / 2**i), math.ceil(width / patch / 2**i)) for i in range(count)]
    if (1, 1) in maps[:-1]:
        return "merged"
    for i, (h, w) in enumerate(maps):
        dim = fields["embed_dim"] * 2**i
        if fields["heads"][i] == 0 or dim % fields["heads"][i]:
            return "heads"
        if fields["moa_enabled"] and i < count - 1 and min(h, w) >= window:
            if fields["moa_form"] == "paper" and dim % fields["moa_reduction"]:
                return "reduction"
            if fields["moa_reduction"] > dim:
                return "reduction"
            if fields["moa_overlap"] > window:
                return "overlap"
    if fields["moa_form"] == "published":
        for i, (h, w) in enumerate(maps):
            local = min(h, w, window)
            odd = i < count - 1 and (h % 2 or w % 2)
            if h % local or w % local or odd or height % patch or width % patch:
                return "published"
    return None


def test_hundreds_of_geometries_run_or_fail_with_the_right_error_before_building(model_config):
    met: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(geometries())
    def run_or_fail(fields):
        expected = why_not(fields)
        met[expected or "runs"] += 1
        size = fields["image_size"]
        config = model_config(mlp_ratio=1, drop_path=0.1, **{key: fields[key] for key in fields if key != "image_size"})
        if expected:
            with pytest.raises(UserError, match=expected):
                check_model(config, size)
            return
        check_model(config, size)
        model = create_model(config, image_size=size, num_classes=3)
        met.update(kinds(fields, model.stages))
        images = torch.randn(2, 3, *size)
        maps = model.forward_features(images)
        logits = model(images)
        logits.square().sum().backward()
        assert logits.shape == (2, 3)
        assert [tuple(each.shape[2:]) for each in maps] == [stage.map_size for stage in model.stages]
        assert logits.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    run_or_fail()
    print(met)
    assert met["runs"] >= 200
    assert min(met[kind] for kind in KINDS) >= 15
    assert min(met[flaw] for flaw in (*FLAWS, "published")) >= 3


KINDS = (
    *("rectangle", "pads patches", "pads windows", "pads pairs", "window larger than a map"),
    *("paper with MOA", "published with MOA", "several MOA blocks", "several windows"),
    *(f"{count} stages" for count in range(1, 6)),
)


def kinds(fields: dict, stages: Sequence[StagePlan]) -> Iterator[str]:
    """Yield the features of a geometry that runs."""
    patch, moa = fields["patch_size"], [stage for stage in stages if stage.moa]
    found = (
        fields["image_size"][0] != fields["image_size"][1],
        any(side % patch for side in fields["image_size"]),
        any(side % stage.window for stage in stages for side in stage.map_size),
        any(side % 2 for stage in stages[:-1] for side in stage.map_size),
        any(fields["window"] > min(stage.map_size) for stage in stages),
        fields["moa_form"] == "paper" and bool(moa),
        fields["moa_form"] == "published" and bool(moa),
        len(moa) > 1,
        any(stage.windows != (1, 1) for stage in moa),
        *(len(stages) == count for count in range(1, 6)),
    )
    yield from (kind for kind, holds in zip(KINDS, found, strict=True) if holds)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"heads": (3, 5, 12)}, ["Stage 1 (map 28 x 28, 192 channels)", "heads=5", "4, 6"]),
        ({"embed_dim": 100, "heads": (2, 2, 2)}, ["Stage 0", "100 channels", "moa.reduction=32", "20, 25, 50"]),
        ({"moa_reduction": 128}, ["Stage 0", "moa.reduction=128", "48, 96"]),
        ({"moa_overlap": 15}, ["Stage 0", "moa.overlap=15", "0 to 14"]),
        ({"moa_form": "published", "image_size": (250, 250)}, ["250 x 250", "224", "63 x 63"]),
        ({"image_size": (3, 224)}, ["3 x 224", "patch_size <= 3"]),
        ({"image_size": (8, 8)}, ["Stage 1 (map 1 x 1", "at most 2 stages"]),
        ({"depths": (2, 2)}, ["depths=[2, 2]", "heads=[3, 6, 12]"]),
        ({"mlp_ratio": 0.001}, ["mlp_ratio=0.001"]),
        ({"patch_size": 6, "conv": ["stem"]}, ["model.conv=[stem]", "patch_size=6", "2, 4, 8 or 16"]),
        (
            {"conv": ["stem"], "patch_size": 16, "embed_dim": 4, "heads": [1, 2, 4]},
            ["embed_dim=4", "half of patch_size=16"],
        ),
        ({"stem_blocks": 2, "conv": ["mlp"]}, ["model.stem_blocks=2", "add stem to model.conv"]),
        ({"moa_form": "published", "conv": ["mlp"]}, ["model.conv=['mlp']", "moa.form=paper"]),
    ],
)
def test_errors_name_the_stage_the_numbers_and_what_would_work(model_config, changes, parts):
    size = changes.pop("image_size", (224, 224))
    with pytest.raises(UserError) as caught:
        create_model(model_config(**changes), image_size=size, num_classes=1000)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("swin", {"image_size": (30, 32)}, ["30 pixels", "28, 32", "2, 3, 5"]),
        ("swin", {"heads": (3, 6, 13)}, ["Stage 2", "heads=13", "12, 16"]),
        ("swin", {"depths": (1,), "heads": (3,)}, ["depths=[1]", "depths=[2]"]),
        ("vit", {}, ["one stage", "[12]"]),
        ("vit", {"depths": (1,), "heads": (5,)}, ["heads=5", "4, 6"]),
        ("vit", {"depths": (1,), "heads": (3,), "drop_path": 0.1}, ["drop_path=0.1"]),
        ("resnet", {}, ["four stages"]),
        ("resnet", {"depths": (1,) * 4, "embed_dim": 64, "patch_size": 3}, ["patch_size=3"]),
        ("resnet", {"depths": (1,) * 4, "embed_dim": 64, "dropout": 0.1}, ["dropout=0.1"]),
    ],
)
def test_baselines_are_checked_too(model_config, name, changes, parts):
    size = changes.pop("image_size", (224, 224))
    with pytest.raises(UserError) as caught:
        check_model(model_config(name=name, **changes), size)
    for part in parts:
        assert part in str(caught.value)


def test_sizes_named_by_an_error_work(model_config):
    config = model_config(moa_form="published")
    with pytest.raises(UserError, match="Nearest sizes that do: 48, 112, 224") as caught:
        check_model(config, (230, 230))
    assert "230 x 230" in str(caught.value)
    for side in (48, 112, 224):
        check_model(config, (side, side))


def test_plan_of_the_published_model(model_config):
    stages = plan_stages(model_config(), (224, 224))
    assert [(stage.map_size, stage.dim, stage.windows, stage.moa) for stage in stages] == [
        ((56, 56), 96, (4, 4), True),
        ((28, 28), 192, (2, 2), True),
        ((14, 14), 384, (1, 1), False),
    ]


def test_nearest_divisors():
    assert nearest_divisors(96, 7) == "4, 6, 8"
    assert nearest_divisors(1, 9) == "1"
