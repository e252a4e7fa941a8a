"""Any geometry: either the model runs, with finite outputs and gradients, or the error comes first and is right."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_train.model import check_model, create_model
from moa_train.model.stages import Stage, nearest_divisors, plan_stages
from moa_train.runtime.errors import UserError

FLAWS = ("heads", "reduction", "overlap", "patch", "merged")


@st.composite
def geometries(draw: st.DrawFn) -> dict:
    """Settings that fit together, mostly: one in a few has a flaw. Sides are drawn as maps, then made pixels."""
    flaw = draw(st.sampled_from([None] * 12 + list(FLAWS)))
    form = draw(st.sampled_from(["paper", "paper", "released"]))
    count, patch, window = (draw(st.sampled_from(range(1, most + 1))) for most in (5, 16, 9))
    if form == "released":  # which mostly needs sizes that divide
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
    """A word that the error must contain, by rules written down a second time; None where the model must run."""
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
    if fields["moa_form"] == "released":
        for i, (h, w) in enumerate(maps):
            local = min(h, w, window)
            odd = i < count - 1 and (h % 2 or w % 2)
            if h % local or w % local or odd or height % patch or width % patch:
                return "released"
    return None


def test_hundreds_of_geometries_run_or_say_why_not_before_building():
    met: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(geometries())
    def run_or_say_why_not(fields):
        expected = why_not(fields)
        met[expected or "runs"] += 1
        if expected:
            with pytest.raises(UserError, match=expected):
                check_model("moa", num_classes=3, **fields)
            return
        check_model("moa", num_classes=3, **fields)
        model = create_model("moa", num_classes=3, mlp_ratio=1, drop_path=0.1, **fields)
        met.update(kinds(fields, model.stages))
        images = torch.randn(2, 3, *fields["image_size"])
        maps = model.forward_features(images)
        logits = model(images)
        logits.square().sum().backward()
        assert logits.shape == (2, 3)
        assert [tuple(each.shape[2:]) for each in maps] == [stage.map_size for stage in model.stages]
        assert logits.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

    run_or_say_why_not()
    print(met)
    assert met["runs"] >= 200
    assert min(met[kind] for kind in KINDS) >= 15
    assert min(met[flaw] for flaw in (*FLAWS, "released")) >= 3


KINDS = (
    *("rectangle", "pads patches", "pads windows", "pads pairs", "window larger than a map"),
    *("paper with MOA", "released with MOA", "several MOA blocks", "several windows"),
    *(f"{count} stages" for count in range(1, 6)),
)


def kinds(fields: dict, stages: Sequence[Stage]) -> Iterator[str]:
    """What there is to see in a geometry that runs."""
    patch, moa = fields["patch_size"], [stage for stage in stages if stage.moa]
    found = (
        fields["image_size"][0] != fields["image_size"][1],
        any(side % patch for side in fields["image_size"]),
        any(side % stage.window for stage in stages for side in stage.map_size),
        any(side % 2 for stage in stages[:-1] for side in stage.map_size),
        any(fields["window"] > min(stage.map_size) for stage in stages),
        fields["moa_form"] == "paper" and bool(moa),
        fields["moa_form"] == "released" and bool(moa),
        len(moa) > 1,
        any(stage.windows != (1, 1) for stage in moa),
        *(len(stages) == count for count in range(1, 6)),
    )
    yield from (kind for kind, holds in zip(KINDS, found, strict=True) if holds)


GOOD = {
    "image_size": (224, 224),
    "num_classes": 1000,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": (2, 2, 8),
    "heads": (3, 6, 12),
    "window": 14,
}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"heads": (3, 5, 12)}, ["Stage 1 (map 28 x 28, 192 channels)", "heads=5", "4, 6"]),
        ({"embed_dim": 100, "heads": (2, 2, 2)}, ["Stage 0", "100 channels", "moa.reduction=32", "20, 25, 50"]),
        ({"moa_reduction": 128}, ["Stage 0", "moa.reduction=128", "48, 96"]),
        ({"moa_overlap": 15}, ["Stage 0", "moa.overlap=15", "0 to 14"]),
        ({"moa_form": "released", "image_size": (250, 250)}, ["250 x 250", "224", "63 x 63"]),
        ({"moa_form": "papper"}, ["moa.form=papper", "'paper'"]),
        ({"image_size": (3, 224)}, ["3 x 224", "patch_size <= 3"]),
        ({"image_size": (8, 8)}, ["Stage 1 (map 1 x 1", "at most 2 stages"]),
        ({"depths": (2, 2)}, ["depths=[2, 2]", "heads=[3, 6, 12]"]),
        ({"depths": (2, 0, 8)}, ["Stage 1", "depths[1]=0"]),
        ({"window": 0}, ["window=0", "at least 1"]),
        ({"drop_path": 1.0}, ["drop_path=1.0"]),
        ({"num_classes": 0}, ["num_classes=0"]),
        ({"mlp_ratio": 0.001}, ["mlp_ratio=0.001"]),
    ],
)
def test_errors_name_the_stage_the_numbers_and_what_would_work(changes, parts):
    with pytest.raises(UserError) as caught:
        create_model("moa", **{**GOOD, **changes})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("moe", {}, ["model.name=moe", "'moa'"]),
        ("swin", {"image_size": (30, 32)}, ["30 pixels", "28, 32", "2, 3, 5"]),
        ("swin", {"heads": (3, 6, 13)}, ["Stage 2", "heads=13", "12, 16"]),
        ("swin", {"depths": (1,), "heads": (3,)}, ["depths=[1]", "depths=[2]"]),
        ("vit", {}, ["one stage", "[12]"]),
        ("vit", {"depths": (1,), "heads": (5,)}, ["heads=5", "4, 6"]),
        ("vit", {"depths": (1,), "heads": (3,), "drop_path": 0.1}, ["drop_path=0.1"]),
        ("resnet", {}, ["four stages"]),
        ("resnet", {"depths": (1,) * 4}, ["embed_dim=96", "64"]),
        ("resnet", {"depths": (1,) * 4, "embed_dim": 64, "patch_size": 3}, ["patch_size=3"]),
        ("resnet", {"depths": (1,) * 4, "embed_dim": 64, "dropout": 0.1}, ["dropout=0.1"]),
    ],
)
def test_baselines_are_checked_too(name, changes, parts):
    with pytest.raises(UserError) as caught:
        check_model(name, **{**GOOD, **changes})
    for part in parts:
        assert part in str(caught.value)


def test_sizes_named_by_an_error_work():
    check_model("moa", **GOOD, moa_form="released")
    with pytest.raises(UserError, match="Nearest sizes that do: 48, 112, 224") as caught:
        check_model("moa", **{**GOOD, "image_size": (230, 230)}, moa_form="released")
    assert "230 x 230" in str(caught.value)
    for side in (48, 112, 224):
        check_model("moa", **{**GOOD, "image_size": (side, side)}, moa_form="released")


def test_plan_of_the_published_model():
    stages = plan_stages(**{key: value for key, value in GOOD.items() if key != "num_classes"})
    assert [(stage.map_size, stage.dim, stage.windows, stage.moa) for stage in stages] == [
        ((56, 56), 96, (4, 4), True),
        ((28, 28), 192, (2, 2), True),
        ((14, 14), 384, (1, 1), False),
    ]


def test_nearest_divisors():
    assert nearest_divisors(96, 7) == "4, 6, 8"
    assert nearest_divisors(1, 9) == "1"
