"""A GPU that is not there: tensors in the host's memory that torch takes for those of `cuda:0`, while a test lasts.

Every operator is the host's own, so that results are the host's to the bit. What is pretended is where a tensor lies,
by its storage: `tensor.device` says so, and whatever a real GPU would refuse is refused. Operators whose tensors lie in
two places raise, but for a copy and for numbers without dimensions where torch takes them from the host; so do numpy,
and a generator of the host that is to fill a tensor of the GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
_DEVICE, _IS_CUDA = (vars(torch._C.TensorBase)[name].__get__ for name in ("device", "is_cuda"))
_ASKED = {
    _DEVICE, _IS_CUDA, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.cuda, Tensor.backward, Tensor.to,
}  # fmt: skip
_COPIES, _FILLS = {"aten::copy_", "aten::_to_copy"}, {"aten::fill_", "aten::index_put_"}


def _values(given: Any) -> Iterator[Any]:
    """What is in arguments, lists and tuples among them."""
    for each in given.values() if isinstance(given, dict) else given:
        if isinstance(each, (tuple, list, dict)):
            yield from _values(each)
        else:
            yield each


class WrongPlace(RuntimeError):
    """What a real GPU would refuse."""


class PretendedGpu:
    """Which storages lie on it, and how often operators ran there and on the host: `ran[True]`, `ran[False]`."""

    def __init__(self) -> None:
        self._there: dict[int, StorageWeakRef] = {}
        self.ran: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}

    def has(self, tensor: Tensor) -> bool:
        return self.holds(tensor.untyped_storage()._cdata)

    def holds(self, storage: int) -> bool:
        found = self._there.get(storage)
        return found is not None and not found.expired()

    def put(self, tensor: Tensor, there: bool) -> Tensor:
        """A tensor that nothing else shares its storage with."""
        storage = tensor.untyped_storage()
        if there:
            self._there[storage._cdata] = StorageWeakRef(storage)
        else:
            self._there.pop(storage._cdata, None)
        return tensor

    def moved(self, tensor: Tensor, there: bool) -> Tensor:
        """A copy in the other place, through which gradients go."""
        return tensor if self.has(tensor) == there else _Move.apply(tensor, self, there)  # pyright: ignore


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, gpu: PretendedGpu, there: bool) -> Tensor:
        ctx.gpu, ctx.there = gpu, there
        return gpu.put(torch.empty_like(tensor).copy_(tensor), there)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.gpu.moved(gradient, not ctx.there), None, None


class _Operators(TorchDispatchMode):
    """Refuses operators on tensors of two places, and notes where what they give lies."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, places, drawn = func._schema.name, dict[int, bool](), False
        held = []
        for each in _values((args, kwargs)):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()._cdata
                held.append(storage)
                places[id(each)] = self.gpu.holds(storage)
            elif isinstance(each, torch.Generator):
                drawn = True
        there = True in places.values()
        if there and name not in _COPIES and (drawn or False in places.values()):
            self._refuse(func, args, kwargs, places)
        found = func(*args, **kwargs)
        self.gpu.ran[there][name] += 1
        if there and name != "aten::copy_":
            for each in _values((found,)):
                real = isinstance(each, Tensor) and each.device.type != "meta"
                if real and each.untyped_storage()._cdata not in held:
                    self.gpu.put(each, True)
        return found

    def _refuse(self, func, args: tuple, kwargs: dict, places: dict[int, bool]) -> None:
        pointwise = torch.Tag.pointwise in func.tags or func._schema.name in _FILLS
        written = {each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write}
        named = [*zip((each.name for each in func._schema.arguments), args, strict=False), *kwargs.items()]
        for argument, value in named:
            for each in _values((value,)):
                if isinstance(each, torch.Generator):
                    raise WrongPlace(f"{func}: a generator of cpu fills a tensor of {GPU}")
                of_host = isinstance(each, Tensor) and not places.get(id(each), True)
                if of_host and (each.dim() or not pointwise or argument in written):
                    raise WrongPlace(f"{func}: {argument} {tuple(each.shape)} is on cpu, others on {GPU}")


class _Functions(TorchFunctionMode):
    """What asks where a tensor lies, or says where one is to be."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device = kwargs.get("device") if kwargs else None
        if func not in _ASKED and (device is None or torch.device(device).type == "meta"):
            return func(*args, **(kwargs or {}))
        kwargs, gpu, first = dict(kwargs or {}), self.gpu, args[0] if args else None
        if func == _DEVICE:
            return GPU if gpu.has(first) else func(*args)
        if func == _IS_CUDA:
            return gpu.has(first)
        if func in (Tensor.numpy, Tensor.__array__):
            if gpu.has(first):
                raise WrongPlace(f"numpy of a tensor of {GPU}")
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return gpu.moved(first, False)
        if func is Tensor.cuda:
            return gpu.moved(first, True)
        if func is Tensor.backward:
            with self:
                return torch.autograd.backward(first, kwargs.pop("gradient"), **kwargs)
        if func is Tensor.to:
            return self._to(first, args[1:], kwargs)
        there = torch.device(device).type == "cuda"
        if there and kwargs.get("generator") is not None:
            raise WrongPlace(f"{func.__name__}: a generator of cpu fills a tensor of {GPU}")
        found = func(*args, **kwargs | {"device": "cpu"})
        given = [each for each in _values((args, kwargs)) if isinstance(each, Tensor)]
        shared = any(each.untyped_storage()._cdata == found.untyped_storage()._cdata for each in given)
        return gpu.moved(found, there) if shared else gpu.put(found, there)

    def _to(self, tensor: Tensor, args: tuple, kwargs: dict) -> Tensor:
        there = self.gpu.has(tensor)
        for each in (*args, kwargs.get("device"), kwargs.get("other")):
            if isinstance(each, Tensor):
                there = self.gpu.has(each)
            elif isinstance(each, (str, torch.device)):
                if torch.device(each).type == "meta":
                    return tensor.to(*args, **kwargs)
                there = torch.device(each).type == "cuda"
        of_host = [torch.device("cpu") if isinstance(each, (str, torch.device)) else each for each in args]
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return self.gpu.moved(tensor.to(*of_host, **kwargs), there)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Within it torch seems to see one GPU, which multiplies no bfloat16, nor does the host."""
    gpu = PretendedGpu()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"is_available": True, "device_count": 1, "is_bf16_supported": False}.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended")
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        # what runs backwards is written in Python, and what it calls is to be seen as well
        patch.setattr(torch.autograd, "has_torch_function", lambda tensors: False, raising=False)
        # operators are not asked from within where a tensor lies that they keep for the way back
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        patch.setitem(checks, "default", lambda tensor: (tensor.shape, tensor.dtype))
        with _Operators(gpu), _Functions(gpu):
            yield gpu
