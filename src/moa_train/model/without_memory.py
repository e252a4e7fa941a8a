"""Run a model on tensors without memory, operation by operation as on a real device.

PyTorch's FakeTensorMode does the same, but its first operation imports torch._dynamo and SymPy, which takes as long as
importing torch. So do most operations on meta tensors. Here, `RULES` gives the results of the operations that the
models of this package use; PyTorch's own functions for meta tensors handle all others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class Hollow(Tensor):
    """A tensor that claims to be on ``device``, with the shape, strides and dtype of ``meta``, a meta tensor."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> "Hollow":
        """Wrap ``meta``."""
        hollow: Hollow = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        hollow.meta = meta
        return hollow

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} on a tensor without memory, outside of WithoutMemory")

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of ``meta``, which views share."""
        return self.meta.untyped_storage()


class LightMode(TorchDispatchMode):
    """A dispatch mode that does not import torch._dynamo only to exclude itself from compilation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class WithoutMemory(LightMode):
    """While this mode is active, new tensors on ``device`` have no memory. With "meta", it only makes them faster."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = torch.empty(0, device=device).device  # with an index, which autograd requires of a GPU

    def hollow(self, model: nn.Module) -> None:
        """Replace the parameters and buffers of a model on the meta device by tensors on the device of this mode."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=self.device))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.device.type == "meta":
            elsewhere = any(isinstance(value, Tensor) and value.device.type != "meta" for value in args)
            if elsewhere or torch.device(kwargs.get("device") or "meta").type != "meta":
                return func(*args, **kwargs)
            return meta_result(func, args, kwargs)
        device = kwargs.get("device")
        here = device is None or device.type == self.device.type
        if Hollow not in types and (device is None or not here):
            return func(*args, **kwargs)
        given: dict[int, Hollow] = {}

        def meta(x: Tensor) -> Tensor:
            if not isinstance(x, Hollow):  # a constant
                return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
            given[id(x.meta)] = x
            return x.meta

        def hollow(x: Tensor) -> Tensor:
            return given[id(x)] if id(x) in given else Hollow(x, self.device if here else device)

        on_meta = {**kwargs, "device": torch.device("meta")} if device is not None else kwargs
        result = meta_result(func, *tree_map_only(Tensor, meta, (args, on_meta)))
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **kwargs)  # changes the shape of the hollow tensor itself
        return tree_map_only(Tensor, hollow, result)


def meta_result(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation on meta tensors, by its rule if there is one that applies."""
    if func in RULES and (result := RULES[func](*args, **kwargs)) is not None:
        return result
    if func.overloadpacket.__name__.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return args[0]  # changes values only
    return func(*args, **kwargs)


def _new(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype or like.dtype, device="meta")


def _contiguous(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return _new(x, x.size(), dtype)


def _is_row_major(x: Tensor) -> bool:
    strides = [stride for size, stride in zip(x.size(), x.stride(), strict=True) if size > 1 and stride]
    return strides == sorted(strides, reverse=True)


def _elementwise(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    """Return a result in which the dimensions have the same order in memory as in ``x``."""
    return _contiguous(x, dtype=dtype) if _is_row_major(x) else x.to(dtype or x.dtype, copy=True)


def _binary(x: Tensor, y: Tensor | float, **_: Any) -> Tensor | None:
    dtype = torch.result_type(x, y)
    if not isinstance(y, Tensor) or (x.size() == y.size() and x.stride() == y.stride()):
        return _elementwise(x, dtype=dtype)
    if _is_row_major(x) and _is_row_major(y):
        return _new(x, torch.broadcast_tensors(x, y)[0].size(), dtype)  # broadcast_shapes imports SymPy
    return None


def _quotient(x: Tensor, _: float) -> Tensor | None:
    return _elementwise(x) if x.is_floating_point() else None


def _reduced(
    x: Tensor, dims: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    if not dims or not x.is_floating_point():
        return None
    reduced = {dim % x.dim() for dim in dims}
    size = [1 if dim in reduced else n for dim, n in enumerate(x.size()) if keepdim or dim not in reduced]
    return _new(x, size, dtype)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if any((x.dim(), x.dtype) != (first.dim(), first.dtype) for x in tensors) or not any(map(_is_row_major, tensors)):
        return None
    size = list(first.size())
    size[dim] = sum(x.shape[dim] for x in tensors)
    return _new(first, size)


def _padded(x: Tensor, padding: Sequence[int], *_: Any) -> Tensor | None:
    if not x.is_contiguous():
        return None
    size = list(x.size())
    for place, number in enumerate(padding):  # two numbers per dimension, the last dimension first
        size[-1 - place // 2] += number
    return _new(x, size)


def _normalized(x: Tensor, shape: Sequence[int], weight: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    statistics = [*x.size()[: -len(shape)], *[1] * len(shape)]
    dtype = x.dtype if weight is None else weight.dtype
    return _contiguous(x), _new(x, statistics, dtype), _new(x, statistics, dtype)


def _filled(size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _range(end: float, dtype: torch.dtype | None = None, **_: Any) -> Tensor | None:
    return _filled([end], dtype or torch.int64) if isinstance(end, int) else None


RULES: dict[Any, Callable[..., Any]] = {
    aten.zeros.default: _filled,
    aten.ones.default: _filled,
    aten.arange.default: _range,
    aten.zeros_like.default: _elementwise,
    aten.ones_like.default: _elementwise,
    aten.new_zeros.default: _new,
    aten.new_empty_strided.default: lambda x, size, stride, **_: torch.empty_strided(
        size, stride, dtype=x.dtype, device="meta"
    ),
    aten._unsafe_view.default: lambda x, size: x.view(size),
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.mul.Tensor: _binary,
    aten.mul.Scalar: _binary,
    aten.div.Scalar: _quotient,
    aten.eq.Scalar: lambda x, number: _elementwise(x, dtype=torch.bool),
    aten.gelu.default: _elementwise,
    aten.gelu_backward.default: _elementwise,
    aten._softmax.default: _contiguous,
    aten._safe_softmax.default: _contiguous,
    aten._log_softmax.default: _contiguous,
    aten._softmax_backward_data.default: lambda grad, out, dim, dtype: _contiguous(grad, dtype=dtype),
    aten._log_softmax_backward_data.default: lambda grad, out, dim, dtype: _contiguous(grad, dtype=dtype),
    aten.native_layer_norm.default: _normalized,
    aten.native_layer_norm_backward.default: lambda grad, x, shape, mean, rstd, weight, bias, mask: tuple(
        None if tensor is None else _contiguous(tensor) for tensor in (x, weight, bias)
    ),
    aten.mm.default: lambda x, y: _new(x, [x.shape[0], y.shape[1]]),
    aten.bmm.default: lambda x, y: _new(x, [*x.shape[:2], y.shape[2]]),
    aten.addmm.default: lambda bias, x, y, **_: _new(x, [x.shape[0], y.shape[1]]),
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.cat.default: _joined,
    aten.constant_pad_nd.default: _padded,
    aten.index_select.default: lambda x, dim, index: _new(
        x, [len(index) if place == dim % x.dim() else n for place, n in enumerate(x.shape)]
    ),
    aten.index_add.default: _contiguous,
    aten.slice_backward.default: lambda grad, size, *_: _new(grad, size),
    aten.unfold_backward.default: lambda grad, size, *_: _new(grad, size),
    aten.nll_loss_forward.default: lambda x, *_: (_new(x, []), _new(x, [])),
    aten.nll_loss_backward.default: lambda grad, x, *_: _contiguous(x),
}
"""The results of operations on meta tensors, or None where a rule does not apply."""
