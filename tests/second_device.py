"""A second device for tests on a machine that has one: its tensors lie in the CPU's memory, but torch keeps them apart.

Like a GPU, it refuses operations on tensors of two devices, except copies, scalars and indices on the CPU.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "second"
_MIXED = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
}


class _Second(Tensor):
    """A tensor on the second device; `raw`: on the CPU, the same memory."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "_Second":
        made: _Second = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=SECOND
        )
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:
        return f"second({self.raw!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = _Second(self.raw.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = torch.device(kwargs.pop("device", None) or SECOND)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if func not in _MIXED and any(value.dim() for value in given if not isinstance(value, _Second)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        own = {id(value.raw): value for value in given if isinstance(value, _Second)}
        plain_args, plain = tree_map_only(_Second, lambda value: value.raw, (args, kwargs))
        if func is torch.ops.aten.histc.default:  # which GPUs have for integers
            plain_args = (plain_args[0].float(), *plain_args[1:])
        found = func(*plain_args, **plain)
        if where.type != _NAME or func is torch.ops.aten._local_scalar_dense.default:
            return found
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map_only(Tensor, lambda value: own[id(value)] if id(value) in own else _Second(value), found)


class Literals(TorchFunctionMode):
    """Lets `torch.tensor(values, device=SECOND)` work."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == SECOND:
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(SECOND)
        return func(*args, **kwargs)


def _created(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Create a tensor, or copy one of the CPU."""
    kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    return tree_map_only(Tensor, _Second, func(*args, **kwargs))


class _Module:
    """What torch asks of `torch.second`; other tests in this process must not find an accelerator."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 0


_setup_privateuseone_for_python_backend(_NAME, backend_module=_Module())
SECOND = torch.device(_NAME, 0)
_library = torch.library.Library("_", "IMPL")
_library.fallback(_created, "PrivateUse1")
_resizing = torch.library.Library("aten", "IMPL")  # of these, torch would resize an empty tensor
for _op in (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.eye.default,
    torch.ops.aten.eye.m,
):
    _resizing.impl(_op.name(), partial(_created, _op), "PrivateUse1")
