"""Both forms of the model against plain loops over windows, heads and pairs of positions, in float64.

The loops below follow the text and share no code with the model: they visit positions one by one and never visit
padding, and they address the memory that the published form reinterprets by its linear index.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moa_train.model.registry import create_model
from moa_train.report.attention import attention_maps
from moa_train.schema import MoaConfig, ModelConfig

EPSILON = 1e-5  # of nn.LayerNorm


class Loops:
    """The network of one image, computed from its state dict."""

    def __init__(self, weights: dict[str, Tensor], *, form: str, window: int, overlap: int, reduction: int) -> None:
        self.weights = weights
        self.form, self.window, self.overlap, self.reduction = form, window, overlap, reduction
        self.attention: dict[str, list[dict]] = {}  # by layer: a dictionary (head, query, key) -> weight per call

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self[f"{name}.weight"].flatten(1) @ x
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centered = x - x.mean()
        return centered / (centered.square().mean() + EPSILON).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def attend(self, name: str, q: dict, k: dict, v: dict, grid: tuple[int, int]) -> dict:
        """Attention among cells (row, column) of a grid; q, k, v map cells to vectors of all heads."""
        table = self[f"{name}.relative_position_bias_table"]
        heads = table.shape[-1]
        table = table.reshape(2 * grid[0] - 1, 2 * grid[1] - 1, heads)
        result, seen = {}, {}
        self.attention.setdefault(name, []).append(seen)
        for cell in q:
            parts = []
            for head in range(heads):
                width = len(q[cell]) // heads
                own = slice(head * width, (head + 1) * width)
                scores = {
                    other: (q[cell][own] * k[other][own]).sum() / math.sqrt(width)
                    + table[cell[0] - other[0] + grid[0] - 1, cell[1] - other[1] + grid[1] - 1, head]
                    for other in k
                }
                total = sum(score.exp() for score in scores.values())
                seen.update({(head, cell, other): score.exp() / total for other, score in scores.items()})
                parts.append(sum(score.exp() / total * v[other][own] for other, score in scores.items()))
            result[cell] = self.linear(f"{name}.proj", torch.cat(parts))
        return result

    def network(self, image: Tensor, patch: int, depths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits and every stage's map (H, W, C)."""
        maps, x = [], self.embed(image, patch)
        for stage, depth in enumerate(depths):
            window = min(self.window, *x.shape[:2])
            for block in range(depth):
                x = self.local_block(f"layers.{stage}.blocks.{block}", x, window)
            last = stage == len(depths) - 1
            if not last and min(x.shape[:2]) >= self.window:
                x = self.moa(f"layers.{stage}.moa", x) if self.form == "paper" else self.published(f"layers.{stage}", x)
            maps.append(x)
            if not last:
                x = self.merge(f"layers.{stage}.downsample", x)
        tokens = [self.norm("norm", x[y, z]) for y, z in cells(x)]
        return self.linear("head", sum(tokens) / len(tokens)), maps

    def embed(self, image: Tensor, patch: int) -> Tensor:
        channels, height, width = image.shape
        rows = []
        for top in range(0, height, patch):
            row = []
            for left in range(0, width, patch):
                cut = torch.zeros(channels, patch, patch, dtype=image.dtype)
                inside = image[:, top : top + patch, left : left + patch]
                cut[:, : inside.shape[1], : inside.shape[2]] = inside
                row.append(self.norm("patch_embed.norm", self.linear("patch_embed.proj", cut.flatten())))
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def local_block(self, name: str, x: Tensor, window: int) -> Tensor:
        qkv = {cell: self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x[cell])).chunk(3) for cell in cells(x)}
        out = {}
        for top, left in product(range(0, x.shape[0], window), range(0, x.shape[1], window)):
            inside = {
                (y, z): qkv[top + y, left + z]
                for y, z in product(range(window), range(window))
                if (top + y, left + z) in qkv
            }
            q, k, v = ({cell: parts[which] for cell, parts in inside.items()} for which in range(3))
            mixed = self.attend(f"{name}.attn", q, k, v, (window, window))
            out.update({(top + y, left + z): x[top + y, left + z] + value for (y, z), value in mixed.items()})
        return stack(
            {cell: y + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", y)) for cell, y in out.items()}, x.shape
        )

    def merge(self, name: str, x: Tensor) -> Tensor:
        height, width, dim = x.shape
        nothing = torch.zeros(dim, dtype=x.dtype)
        out = {}
        for y, z in product(range(-(-height // 2)), range(-(-width // 2))):
            four = [(2 * y, 2 * z), (2 * y + 1, 2 * z), (2 * y, 2 * z + 1), (2 * y + 1, 2 * z + 1)]
            joined = torch.cat([x[cell] if cell[0] < height and cell[1] < width else nothing for cell in four])
            out[y, z] = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", joined))
        return stack(out, (-(-height // 2), -(-width // 2), 2 * dim))

    def moa(self, name: str, x: Tensor) -> Tensor:
        """The paper's block: patches, overlap, padding, bias and broadcast by hand."""
        P, K = self.window, self.window + 2 * self.overlap
        grid = (-(-x.shape[0] // P), -(-x.shape[1] // P))
        thin = {cell: self.linear(f"{name}.reduce", self.norm(f"{name}.norm1", x[cell])) for cell in cells(x)}
        q, k, v = {}, {}, {}
        for i, j in product(range(grid[0]), range(grid[1])):
            q[i, j] = self[f"{name}.q.bias"]
            for dy, dx in product(range(P), range(P)):
                if (i * P + dy, j * P + dx) in thin:
                    q[i, j] = q[i, j] + self[f"{name}.q.weight"][:, :, dy, dx] @ thin[i * P + dy, j * P + dx]
            both = self[f"{name}.kv.bias"]
            for dy, dx in product(range(K), range(K)):
                cell = (i * P + dy - self.overlap, j * P + dx - self.overlap)
                if cell in thin:
                    both = both + self[f"{name}.kv.weight"][:, :, dy, dx] @ thin[cell]
            k[i, j], v[i, j] = both.chunk(2)
        attended = self.attend(name, q, k, v, grid)
        out = {}
        for y, z in cells(x):
            window = (y // P, z // P)
            token = q[window] + attended[window]
            token = token + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", token))
            out[y, z] = x[y, z] + self.linear(f"{name}.expand", token)
        return stack(out, x.shape)

    def published(self, name: str, x: Tensor) -> Tensor:
        """The published block: every reinterpretation is an index into linear memory."""
        H, W, C = x.shape
        P, K, o = self.window, self.window + 2 * self.overlap, self.overlap
        h, w, thinner = H // P, W // P, C // self.reduction
        y = torch.cat([self.norm(f"{name}.norm1", x[cell]) for cell in cells(x)])  # memory of (H, W, C)
        thin = {}  # (channel, row, column) of the memory read as (C, H, W)
        for row, column in product(range(H), range(W)):
            value = self.linear(f"{name}.glb_attn.pre_conv", y[[c * H * W + row * W + column for c in range(C)]])
            thin.update({(c, row, column): value[c] for c in range(thinner)})
        nothing = torch.zeros((), dtype=x.dtype)
        patches = torch.stack(
            [
                thin[c, i * P + dy, j * P + dx]
                for dy, dx, c, i, j in product(range(P), range(P), range(thinner), range(h), range(w))
            ]
        ).view(h * w, -1)
        unfolded = torch.stack(
            [
                thin.get((c, i * P + dy - o, j * P + dx - o), nothing)
                for c, dy, dx, i, j in product(range(thinner), range(K), range(K), range(h), range(w))
            ]
        ).view(h * w, -1)
        grid = list(product(range(h), range(w)))
        q = {cell: self.linear(f"{name}.glb_attn.q", patches[n]) for n, cell in enumerate(grid)}
        kv = {cell: self.linear(f"{name}.glb_attn.kv", unfolded[n]).chunk(2) for n, cell in enumerate(grid)}
        k, v = ({cell: kv[cell][which] for cell in grid} for which in range(2))
        g = self.attend(f"{name}.glb_attn", q, k, v, (h, w))
        spread = torch.cat([g[cell].repeat(P * P) for cell in grid])  # (L, P, P, C) in memory
        memory = (x.reshape(-1) + y + spread).view(H, W, C)
        z = torch.cat([self.norm(f"{name}.norm2", memory[cell]) for cell in cells(memory)])
        as_map = z.view(C, H, W)
        padded = torch.zeros(C, H + 2, W + 2, dtype=x.dtype)
        padded[:, 1:-1, 1:-1] = as_map
        kernel = self[f"{name}.post_conv.weight"].flatten(1)
        convolved = torch.stack(
            [
                kernel @ padded[:, row : row + 3, column : column + 3].flatten() + self[f"{name}.post_conv.bias"]
                for row, column in product(range(H), range(W))
            ],
            dim=1,
        )
        return (z + convolved.reshape(-1)).view(H, W, C)


def cells(x: Tensor) -> list[tuple[int, int]]:
    return list(product(range(x.shape[0]), range(x.shape[1])))


def stack(values: dict, shape: tuple[int, ...]) -> Tensor:
    return torch.stack([values[cell] for cell in product(range(shape[0]), range(shape[1]))]).view(shape)


def build(form: str, image_size, patch, depths, heads, window, overlap, reduction, dim=8):
    """Return a model with random weights, images and the loops."""
    torch.manual_seed(0)
    model = (
        create_model(
            ModelConfig(
                patch_size=patch,
                embed_dim=dim,
                depths=depths,
                heads=heads,
                window=window,
                mlp_ratio=2,
                moa=MoaConfig(form=form, overlap=overlap, reduction=reduction),
            ),
            image_size=image_size,
            num_classes=3,
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    images = torch.randn(2, 3, *image_size, dtype=torch.float64, requires_grad=True)
    weights = dict(model.named_parameters())
    return model, images, Loops(weights, form=form, window=window, overlap=overlap, reduction=reduction)


def compare(form: str, image_size, patch, depths, heads, window, overlap, reduction) -> None:
    model, images, loops = build(form, image_size, patch, depths, heads, window, overlap, reduction)
    weights = loops.weights
    logits, maps = model(images), model.forward_features(images)
    expected = [loops.network(image, patch, depths) for image in images]
    torch.testing.assert_close(logits, torch.stack([one for one, _ in expected]), rtol=1e-11, atol=1e-12)
    for stage, found in enumerate(maps[:-1]):  # the last one is returned after the LayerNorm
        one = torch.stack([each[stage] for _, each in expected]).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, one, rtol=1e-11, atol=1e-12)

    inputs = [images, *weights.values()]
    mine = torch.autograd.grad(logits.square().sum(), inputs)
    theirs = torch.autograd.grad(sum(one.square().sum() for one, _ in expected), inputs)
    for name, own, other in zip(["image", *weights], mine, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("image_size", "patch", "depths", "heads", "window", "overlap", "reduction"),
    [
        pytest.param((6, 6), 1, (1, 1), (2, 4), 3, 1, 4, id="square, divides"),
        pytest.param((6, 9), 1, (1, 1), (2, 2), 3, 0, 8, id="rectangle without overlap, odd sides to merge"),
        pytest.param((11, 14), 2, (1, 1), (1, 2), 3, 2, 2, id="padded to patches, windows and pairs"),
        pytest.param((5, 4), 1, (1, 1, 1), (2, 2, 2), 2, 2, 4, id="overlap of a whole window, two MOA blocks"),
        pytest.param((4, 4), 1, (1, 1), (1, 1), 5, 1, 4, id="window larger than the map: no MOA"),
    ],
)
def test_paper_form_equals_the_loops(image_size, patch, depths, heads, window, overlap, reduction):
    compare("paper", image_size, patch, depths, heads, window, overlap, reduction)


@pytest.mark.parametrize(
    ("image_size", "patch", "depths", "heads", "window", "overlap", "reduction"),
    [
        pytest.param((4, 4), 1, (1, 1), (2, 2), 2, 1, 4, id="a grid of windows"),
        pytest.param((8, 8), 2, (1, 1, 1), (1, 2, 2), 2, 1, 8, id="two global stages"),
        pytest.param((8, 8), 1, (1, 1, 1, 1), (1, 1, 2, 2), 4, 1, 4, id="four stages, the window cut to the map"),
        pytest.param((4, 8), 1, (1, 1), (1, 2), 2, 1, 3, id="rectangle, reduction that does not divide"),
    ],
)
def test_published_form_equals_the_loops(image_size, patch, depths, heads, window, overlap, reduction):
    compare("published", image_size, patch, depths, heads, window, overlap, reduction)


@pytest.mark.parametrize(
    ("form", "image_size", "depths", "heads"),
    [
        pytest.param("paper", (8, 12), (2, 1), (2, 4), id="divides"),
        pytest.param("paper", (11, 14), (1, 1), (1, 2), id="padded"),
        pytest.param("published", (8, 8), (1, 1), (2, 2), id="published"),
    ],
)
def test_attention_maps_equal_the_loops(form, image_size, depths, heads):
    model, images, loops = build(form, image_size, 1, depths, heads, window=4, overlap=1, reduction=4)
    with torch.no_grad():
        expected = model(images)
        loops.network(images[0], 1, depths)
        between, within = attention_maps(model, images)
        assert torch.equal(model(images), expected)  # nothing remains of the recording
    assert [found.name for found in (*between, *within)] == [
        f"layers.0.{'moa' if form == 'paper' else 'glb_attn'}",
        *(f"layers.{stage}.blocks.{block}.attn" for stage, depth in enumerate(depths) for block in range(depth)),
    ]
    for found in between:
        columns, (seen,) = found.grid[1], loops.attention[found.name if form == "published" else "layers.0.moa"]
        own = {
            (head, divmod(query, columns), divmod(key, columns)): found.weights[0, head, query, key]
            for head, query, key in product(*map(range, found.weights.shape[1:]))
        }
        assert own.keys() == seen.keys()
        for place, weight in seen.items():
            assert own[place].item() == pytest.approx(weight.item(), rel=1e-9)
    for found in within:
        for window, seen in enumerate(loops.attention[found.name]):  # row by row, without padding
            for (head, query, key), weight in seen.items():
                places = [row * found.window + column for row, column in (query, key)]
                assert found.weights[0, window, head, *places].item() == pytest.approx(weight.item(), rel=1e-9)
        assert len(loops.attention[found.name]) == found.grid[0] * found.grid[1]
        torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights[..., 0]))


def test_the_boxes_of_the_maps_cover_the_pixels_that_a_key_depends_on():
    model, images, _ = build("paper", (24, 36), 2, (1, 1), (1, 2), window=3, overlap=1, reduction=4)
    with torch.no_grad():
        for block in model.layers[0].blocks:  # without local attention, a position depends on its own pixels only
            block.attn.proj.weight.zero_()
    (found,), _ = attention_maps(model, images)
    assert found.grid == (4, 6)
    layer, kept = model.layers[0].moa, []
    own = layer.attention
    layer.attention = lambda q, k, v: kept.append(k) or own(q, k, v)
    model(images)
    for row, column in product(range(4), range(6)):
        gradient = torch.autograd.grad(kept[0][0, row, column].sum(), images, retain_graph=True)[0][0].abs().sum(0)
        rows, columns = gradient.nonzero().unbind(1)
        box = (rows.min().item(), columns.min().item(), rows.max().item() + 1, columns.max().item() + 1)
        assert box == found.box(row, column, found.overlap)
        top, left, bottom, right = found.box(row, column)
        assert (bottom - top, right - left) == (6, 6)
        assert found.window_at(top, left) == found.window_at(bottom - 1, right - 1) == (row, column)
