"""Quantized weights in the compressed-tensors format, which vLLM and transformers read.

`X.weight` (out, D) is replaced by

    float-quantized, int-quantized   X.weight (out, D) float8_e4m3fn or int8; X.weight_scale (out, 1) float32
    pack-quantized                   X.weight_packed (out, ceil(D / 8)) int32, eight 4-bit values each, the first in the
                                     lowest bits, raised by 8 to be positive; X.weight_scale (out, groups);
                                     X.weight_shape (2,) int64

and config.json declares it in `quantization_config`: one group for all Linear layers, or one for each scheme with the
names of its layers. The variants of the format that these schemes use are read from any writer; all others are refused
by name. torch is imported only where there are tensors.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from numprune.dtypes import BYTES, name_of
from numprune.errors import InputError
from numprune.quantization.schemes import SCHEMES, Scheme, listed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from numprune.quantization.rounding import Quantized

CONFIG_FIELD = "quantization_config"
_METHOD = "compressed-tensors"
_FORMATS = {"fp8": "float-quantized", "w8a8": "int-quantized", "w4a16": "pack-quantized"}
_MIXED = "mixed-precision"  # each group has its own format
_LINEAR = "Linear"
_PER_WORD = 8  # 4-bit values in an int32
_OFFSET = 8  # added to make values unsigned
_SIMPLE = re.compile(r"\^?(?:(?:[\w.-]|\\[.d])[*+]?)*\$?")
_REPEATED = re.compile(r"[*+]")
_MAXIMUM_REPEATED = 3
_ENDINGS = {True: ("weight_packed", "weight_scale", "weight_shape"), False: ("weight", "weight_scale")}


def pack(values: "Tensor") -> "Tensor":
    """Return 4-bit values (out, D) int8 as (out, ceil(D / 8)) int32."""
    import torch

    padding = -values.shape[1] % _PER_WORD
    raised = torch.nn.functional.pad(values.to(torch.int32) + _OFFSET, (0, padding)).unflatten(1, (-1, _PER_WORD))
    shifts = 4 * torch.arange(_PER_WORD, dtype=torch.int32, device=values.device)
    return (raised << shifts).sum(-1, dtype=torch.int32)


def unpack(packed: "Tensor", channels: int) -> "Tensor":
    """Return the values (out, channels) int8 packed by `pack`."""
    import torch

    shifts = 4 * torch.arange(_PER_WORD, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts & 0xF) - _OFFSET).flatten(1)[:, :channels].to(torch.int8)


def endings(scheme: Scheme) -> tuple[str, ...]:
    """Return the suffixes of the names that replace a weight."""
    return _ENDINGS[scheme.name == "w4a16"]


def tensors_of(name: str, matrix: "Quantized", scale_dtype: "torch.dtype") -> dict[str, "Tensor"]:
    """Return the tensors that replace the weight `name`; `scale_dtype`: of group scales."""
    import torch

    path = name.removesuffix("weight")
    if matrix.scheme.name != "w4a16":
        return {name: matrix.values, f"{path}weight_scale": matrix.scales}
    return {
        f"{path}weight_packed": pack(matrix.values),
        f"{path}weight_scale": matrix.scales.to(scale_dtype),
        f"{path}weight_shape": torch.tensor(matrix.values.shape),
    }


def shapes_of(name: str, scheme: Scheme, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `tensors_of` for a matrix of this shape (out, D)."""
    rows, columns = shape
    path = name.removesuffix("weight")
    scales = (rows, columns // (scheme.group_size or columns))
    if scheme.name != "w4a16":
        return {name: shape, f"{path}weight_scale": scales}
    return {
        f"{path}weight_packed": (rows, -(-columns // _PER_WORD)),
        f"{path}weight_scale": scales,
        f"{path}weight_shape": (2,),
    }


def dtypes_of(name: str, scheme: Scheme, scale_dtype: str) -> dict[str, str]:
    """Return the data types of `tensors_of`, by torch's names."""
    path = name.removesuffix("weight")
    if scheme.name != "w4a16":
        return {name: "float8_e4m3fn" if scheme.is_float else "int8", f"{path}weight_scale": "float32"}
    return {f"{path}weight_packed": "int32", f"{path}weight_scale": scale_dtype, f"{path}weight_shape": "int64"}


def bytes_of(scheme: Scheme, shape: tuple[int, ...], scale_dtype: "torch.dtype | str") -> int:
    """Return the bytes of `tensors_of` for a matrix of this shape (out, D); `scale_dtype`: torch's, or its name."""
    dtypes = dtypes_of("weight", scheme, name_of(scale_dtype))
    return sum(prod(part) * BYTES[dtypes[name]] for name, part in shapes_of("weight", scheme, shape).items())


def config_of(schemes: Mapping[str, Scheme], ignored: Collection[str]) -> dict[str, Any]:
    """Return `quantization_config`.

    Args:
        schemes: path -> scheme of every quantized Linear layer, at least one.
        ignored: paths of the unquantized ones.
    """
    paths: dict[Scheme, list[str]] = {}
    for path, scheme in schemes.items():
        paths.setdefault(scheme, []).append(path)
    one = len(paths) == 1
    ordered = sorted(paths, key=str)
    return {
        "quant_method": _METHOD,
        "format": _FORMATS[ordered[0].name] if one else _MIXED,
        "quantization_status": "compressed",
        "ignore": sorted(ignored),
        "config_groups": {
            f"group_{number}": {
                "targets": [_LINEAR] if one else sorted(paths[scheme]),
                **_arguments(scheme),
                **({} if one else {"format": _FORMATS[scheme.name]}),
            }
            for number, scheme in enumerate(ordered)
        },
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """Return the group's entries for the layers of this scheme."""
    group = scheme.group_size
    weights = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    inputs = {**weights, "strategy": "token", "group_size": None, "dynamic": True}
    return {
        "weights": weights,
        "input_activations": inputs if scheme.rounds_inputs else None,
        "output_activations": None,
    }


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization of each Linear layer by config.json.

    Attributes:
        groups: a scheme and its layers.
        ignored: the unquantized layers.
    """

    groups: Sequence[tuple[Scheme, "Layers"]]
    ignored: "Layers"

    def scheme(self, path: str) -> Scheme | None:
        """Return the scheme of the Linear layer at `path`; None: it is not quantized."""
        if self.ignored.name(path):
            return None
        for named in (Layers.name, Layers.is_linear):  # names take precedence over types
            for scheme, layers in self.groups:
                if named(layers, path):
                    return scheme
        return None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return tuple(scheme for scheme, _ in self.groups)

    def __str__(self) -> str:
        return listed(self.schemes)


@dataclass(frozen=True)
class Layers:
    """Linear layers as in `targets` and `ignore`: by name, by pattern, or all of them."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, entries: Any, where: str) -> "Layers":
        """Raise InputError unless the entries are names or simple patterns; others could take exponential time."""
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise InputError(f"{where} is {str(entries)[:80]!r}; it must be a list of strings")
        patterns = []
        for entry in entries:
            if entry.startswith("re:"):
                pattern = entry.removeprefix("re:")
                if not _SIMPLE.fullmatch(pattern) or len(_REPEATED.findall(pattern)) > _MAXIMUM_REPEATED:
                    raise InputError(
                        f"{where}: {entry[:80]!r} is not supported; a pattern may have names, '.', '\\.', '\\d', '^', "
                        f"'$' and up to {_MAXIMUM_REPEATED} of '*' and '+'; name the layers one by one"
                    )
                patterns.append(re.compile(pattern))
        return cls(frozenset(entry for entry in entries if not entry.startswith("re:")), tuple(patterns))

    def name(self, path: str) -> bool:
        """Return whether the layer at `path` is among them by name."""
        return path in self.names or any(pattern.match(path) for pattern in self.patterns)

    def is_linear(self, _path: str) -> bool:
        """Whether all Linear layers are among them."""
        return _LINEAR in self.names


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """Return the quantization declared in the content of a config.json; None: the model is not quantized.

    Raises:
        InputError: it is quantized in another way; names the field.
    """
    found = config.get(CONFIG_FIELD)
    if not found:
        return None
    where = CONFIG_FIELD
    found = _mapping(found, where)
    _only(found.get("quant_method"), (_METHOD,), f"{where}.quant_method")
    groups = _mapping(found.get("config_groups"), f"{where}.config_groups")
    _only(found.get("quantization_status"), ("compressed",), f"{where}.quantization_status")
    for field in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if found.get(field):
            raise InputError(f"{where}.{field}: not supported; {REMEDY}")
    if not groups:
        raise InputError(f"{where}.config_groups is empty; {REMEDY}")
    return QuantizationConfig(
        [_group(group, found.get("format"), f"{where}.config_groups.{name}") for name, group in groups.items()],
        Layers.of(found.get("ignore") or [], f"{where}.ignore"),
    )


def _group(group: Any, form: Any, where: str) -> tuple[Scheme, Layers]:
    """Return the scheme of a group and its layers. Raises InputError."""
    group = _mapping(group, where)
    layers = Layers.of(group.get("targets"), f"{where}.targets")
    for name in layers.names - {_LINEAR}:
        if "." not in name:  # the type of another layer
            raise InputError(f"{where}.targets: {name[:80]!r} is not {_LINEAR!r} or the name of a layer; {REMEDY}")
    _only(group.get("output_activations"), (None,), f"{where}.output_activations")
    weights = _mapping(group.get("weights"), f"{where}.weights")
    form = group.get("format") or form
    _only(form, tuple(_FORMATS.values()), f"{where}.format")
    (name,) = (scheme for scheme in SCHEMES if _FORMATS[scheme] == form)
    grouped = name == "w4a16" and weights.get("strategy") == "group"
    scheme = Scheme(name, weights.get("group_size") if grouped else None)
    wanted = _arguments(scheme)
    _like(weights, wanted["weights"], f"{where}.weights")
    if scheme.rounds_inputs:
        inputs = _mapping(group.get("input_activations"), f"{where}.input_activations")
        _like(inputs, wanted["input_activations"], f"{where}.input_activations")
    else:
        _only(group.get("input_activations"), (None,), f"{where}.input_activations")
    return scheme, layers


REMEDY = "quantize the unquantized checkpoint with numprune quantize"


def _like(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless these arguments of the format have the same meaning as `wanted`."""
    for field, value in wanted.items():
        if field != "group_size" or value is not None:  # does not distinguish rows and tokens
            _only(found.get(field), (value,), f"{where}.{field}")
    _only(found.get("actorder") or None, (None, "static", "weight"), f"{where}.actorder")


def _only(found: object, allowed: tuple[object, ...], where: str) -> None:
    if found not in allowed:
        raise InputError(f"{where} is {str(found)[:80]!r}, not {' or '.join(map(repr, allowed))}; {REMEDY}")


def _mapping(found: object, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is {str(found)[:80]!r}; it must be an object")
    return found
