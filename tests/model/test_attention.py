import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_train.model import attention
from moa_train.model.attention import BiasedAttention, aligned, attend, relative_position_index

GROUPS, HEADS, TOKENS, WIDTH = 5, 3, 196, 32


def inputs(dtype: torch.dtype, tokens: int = TOKENS, device: str = "cpu") -> list[Tensor]:
    shapes = [(GROUPS, HEADS, tokens, WIDTH)] * 3 + [(HEADS, tokens, tokens)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def textbook(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_both_kernels_give_values_and_gradients_of_the_textbook(monkeypatch, fused, tokens):
    monkeypatch.setattr(attention, "fused_pays", lambda *_: fused)
    arguments = [value.requires_grad_() for value in inputs(torch.float64, tokens)]
    for bias in (arguments[3], arguments[3].expand(GROUPS, -1, -1, -1)):
        out, expected = attend(*arguments[:3], bias), textbook(*arguments[:3], bias)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        for own, other in zip(
            torch.autograd.grad(out.square().sum(), arguments),
            torch.autograd.grad(expected.square().sum(), arguments),
            strict=True,
        ):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_masked_keys_are_not_attended(monkeypatch):
    q, k, v, bias = inputs(torch.float64, 9)
    mask = torch.zeros(9, dtype=torch.float64)
    mask[6:] = float("-inf")
    bias_GNLL = (bias + mask).repeat(GROUPS, 1, 1, 1)
    for fused in (True, False):
        monkeypatch.setattr(attention, "fused_pays", lambda *_, fused=fused: fused)
        out = attend(q, k, v, bias_GNLL)
        torch.testing.assert_close(out, textbook(q, k[:, :, :6], v[:, :, :6], bias[..., :6]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [4, 16, TOKENS])
def test_bf16_errs_no_more_than_the_straightforward_bf16_version(training, tokens):
    exact = inputs(torch.float64, tokens)
    q, k, v, bias = (value.bfloat16().requires_grad_(training) for value in exact)
    expected = textbook(*(value.detach().double() for value in (q, k, v, bias)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = attend(q, k, v, bias)
    with torch.no_grad():
        plain = textbook(q, k, v, bias)
    assert own.dtype == torch.bfloat16
    assert (own.double() - expected).norm() <= 1.05 * (plain.double() - expected).norm()


def test_index_orders_offsets_row_by_row():
    index_LL = relative_position_index(2, 3)
    for query in range(6):
        for key in range(6):
            down, right = query // 3 - key // 3, query % 3 - key % 3
            assert index_LL[query, key] == (down + 1) * 5 + right + 2


def test_bias_is_looked_up_by_offset_in_both_layouts():
    table_RRN = torch.randn(3, 5, HEADS)
    for published in (False, True):
        module = BiasedAttention(HEADS, (2, 3), published_layout=published)
        with torch.no_grad():
            module.relative_position_bias_table.copy_(table_RRN.flatten(0, 1) if published else table_RRN)
        bias = module.position_bias(torch.empty(0, dtype=torch.float64))
        assert bias.dtype == torch.float64
        assert torch.equal(bias[:, 0, 5].float(), table_RRN[0, 0])  # from the first cell to the last: farthest offsets
        assert torch.equal(bias[:, 4, 4].float(), table_RRN[1, 2])
        assert ("relative_position_index" in module.state_dict()) == published


def test_aligned_rows_on_cuda_only():
    bias = torch.randn(1, HEADS, TOKENS, TOKENS)
    assert aligned(bias) is bias


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_attention_on_cuda_has_aligned_rows_and_the_gradients_of_the_textbook(dtype):
    arguments = [value.requires_grad_() for value in inputs(dtype, device="cuda")]
    bias = aligned(arguments[3][None])
    assert bias.shape[-1] == TOKENS
    assert all(step % 16 == 0 for step in bias.stride()[:-1])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        fused = F.scaled_dot_product_attention(*arguments[:3], bias.expand(GROUPS, -1, -1, -1))
    torch.testing.assert_close(fused, attend(*arguments), rtol=2e-2, atol=2e-2)
    exact = [value.detach().double().requires_grad_() for value in arguments]
    own = torch.autograd.grad(attend(*arguments).float().square().sum(), arguments)
    other = torch.autograd.grad(textbook(*exact).square().sum(), exact)
    for mine, theirs in zip(own, other, strict=True):
        assert (mine.double() - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # torch.compile has its own
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, TOKENS), (torch.bfloat16, TOKENS), (torch.bfloat16, 16)])
def test_compiled_attention_on_cuda_has_the_gradients_of_the_textbook(dtype, tokens):
    torch._dynamo.reset()
    arguments = [value.requires_grad_() for value in inputs(dtype, tokens, device="cuda")]
    exact = [value.detach().double().requires_grad_() for value in arguments]
    own = torch.autograd.grad(torch.compile(attend, dynamic=False)(*arguments).float().square().sum(), arguments)
    other = torch.autograd.grad(textbook(*exact).square().sum(), exact)
    for mine, theirs in zip(own, other, strict=True):
        assert (mine.double() - theirs).norm() <= 0.03 * theirs.norm()


def test_the_gradient_of_the_table_adds_up_bf16_in_fp32():
    """Each cell of the table sums up to 196 terms: in bf16 that would lose 1 to 2%."""
    module = BiasedAttention(2, (14, 14))
    upstream = torch.rand(2, 196, 196).bfloat16()
    (own,) = torch.autograd.grad(
        module.position_bias(torch.empty(0, dtype=torch.bfloat16)), module.relative_position_bias_table, upstream
    )
    exact = BiasedAttention(2, (14, 14)).double()
    (expected,) = torch.autograd.grad(
        exact.position_bias(torch.empty(0, dtype=torch.float64)), exact.relative_position_bias_table, upstream.double()
    )
    assert own.dtype == torch.float32
    assert (own.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("published_layout", [False, True])
def test_the_gradient_of_the_table_lies_in_memory_as_the_table_does(heads, published_layout):
    """Else DDP copies it, and says so."""
    attention = BiasedAttention(heads, (4, 4), published_layout=published_layout)
    attention.position_bias(torch.zeros(())).square().sum().backward()
    table = attention.relative_position_bias_table
    assert table.grad.stride() == table.stride()
