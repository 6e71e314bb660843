"""A checkpoint to a quantized one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import card, checkpoint, compressed_tensors, files, manifest
from numprune.export.shards import writing
from numprune.export.streaming import CheckpointLayers
from numprune.export.weights import DTYPES, main_dtype
from numprune.flows.recipe import Quantize
from numprune.plans import PLAN_FILE, Draw, read_plan
from numprune.quantization import Scheme, check_quantizable, quantized_tensors
from numprune.quantization.compressed_tensors import CONFIG_FIELD, config_of, dtypes_of, tensors_of
from numprune.quantization.walk import Fit, check_target, quantize_layers
from numprune.surgery import skeleton
from numprune.target import not_split


def quantize_checkpoint(
    source: Path,
    scheme: Scheme,
    out: Path,
    device: torch.device,
    *,
    rows: Tensor | None = None,
    draw: Draw | None = None,
    dense: Path | None = None,
) -> dict[str, Any]:
    """Write the quantized `source` to the new folder `out`; return the figures. One layer is in memory at a time.

    Args:
        rows: (N, S) int64 calibration tokens for GPTQ; None: each weight is rounded by itself.
        draw: where the rows are from.
        dense: the model that `source` was pruned from, whose residual stream is to be kept to; None: its own.

    Raises:
        InputError: `out` exists, or the model, rows or dense model cannot be used.
        IntegrityError: a file is not what it should be.
    """
    check_request(source, scheme, dense)
    config, dropped = checkpoint.read_config(source), _dropped(source)
    parents = {"base": manifest.folder_digest(source)} | ({"dense": manifest.folder_digest(dense)} if dense else {})
    facts: dict[str, Any] = {
        "scheme": scheme.name,
        "group_size": scheme.group_size,
        "method": "rtn" if rows is None else "gptq",
    }
    if rows is not None:
        facts |= {"rows": rows.shape[0], "sequence_length": rows.shape[1]}
        facts |= {"draw": draw.model_dump(mode="json") if draw else None}
    with manifest.creating(out, kind="checkpoint", parents=parents, facts={"quantization": facts}) as folder:
        layers = CheckpointLayers(source, scratch=folder, device=device)
        target = CheckpointLayers(dense, scratch=folder, device=device) if dense else None
        fit = None if rows is None else Fit(rows, target, dropped)
        _write(layers, scheme, folder, fit)
        _complete(config, scheme, source, folder)
    return {
        "digest": manifest.read(out).digest,
        "weight_bytes_before": checkpoint.weight_bytes(source),
        "weight_bytes_after": checkpoint.weight_bytes(out),
    }


def scheme_of(asked: Quantize) -> Scheme:
    """Return the scheme that a recipe asks for, which is not "none"."""
    assert asked.scheme != "none"
    return Scheme(asked.scheme, asked.channels_per_scale)


def check_request(source: Path, scheme: Scheme, dense: Path | None = None, tensor_parallel: int = 1) -> None:
    """Refuse what `quantize_checkpoint` could not do, or what GPUs that share each layer could not run.

    Raises InputError.
    """
    anatomy = read_anatomy(checkpoint.read_config(source))
    compressed_tensors.refuse_quantized(source, "quantization")
    if faults := not_split(anatomy, tensor_parallel):
        raise InputError(
            f"--tensor-parallel {tensor_parallel} does not divide {'; '.join(faults)}; choose a smaller one, or prune "
            f"again with --tensor-parallel {tensor_parallel}"
        )
    check_quantizable(anatomy, scheme, tensor_parallel)
    if dense is not None:
        compressed_tensors.refuse_quantized(dense, "--dense")
        check_target(anatomy, read_anatomy(checkpoint.read_config(dense)), _dropped(source))


def _dropped(source: Path) -> list[int]:
    path = source / PLAN_FILE
    return list(read_plan(path).dropped_layers()) if path.exists() else []


def _write(layers: CheckpointLayers, scheme: Scheme, folder: Path, fit: Fit | None) -> None:
    """Write the weights."""
    scale_dtype = main_dtype(layers.stored)
    matrices = set(quantized_tensors(layers.anatomy))
    dtypes: dict[str, torch.dtype] = {}
    for name, header in layers.stored.items():
        if name in matrices:
            dtypes |= dtypes_of(name, scheme, scale_dtype)
        else:
            dtypes[name] = DTYPES[header.dtype]
    with writing(folder, dtypes) as writer:
        layers.copy_around(writer)

        def sink(quantized: Any, rest: Any) -> None:
            for name, matrix in quantized.items():
                writer.add(tensors_of(name, matrix, scale_dtype))
            layers.write(rest, writer)

        quantize_layers(layers, scheme, sink, fit, scale_dtype)


def _complete(config: Any, scheme: Scheme, source: Path, folder: Path) -> None:
    """Add all that belongs to a checkpoint beside its weights, and audit it."""
    checkpoint.copy_around_weights(config, source, folder)
    card.set_quantization(folder, scheme)
    matrices = set(quantized_tensors(read_anatomy(config)))
    linears = (name for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear))
    ignored = [name for name in linears if f"{name}.weight" not in matrices]
    content = files.read_object(folder / files.CONFIG)
    content[CONFIG_FIELD] = config_of(scheme, ignored)
    files.write_object(folder / files.CONFIG, content)
    checkpoint.audit(folder)
