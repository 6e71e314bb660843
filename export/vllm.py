"""A checkpoint that vLLM loads: sharded safetensors, tokenizer, generation config, manifest.

Stock architectures run in stock vLLM; layers of different sizes need the plug-in numprune-vllm. Stock vLLM silently
truncates weights that are larger than the configuration says, and fails with a bare assertion at startup on a shape it
cannot serve. Both are detected here first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import JsonValue

from numprune.anatomy import PER_LAYER_PREFIX, family_of, read_anatomy
from numprune.blocks import Anatomy
from numprune.dtypes import name_of
from numprune.errors import InputError
from numprune.export import card_changes, checkpoint, compressed_tensors, manifest, precision, vllm_pooling
from numprune.export.config import write_config
from numprune.export.headers import TensorHeader
from numprune.export.shards import writing
from numprune.export.tasks import load_task
from numprune.export.tokenizer import other_reading
from numprune.export.weights import read_tensor, slabs, stored_parts
from numprune.families import FAMILIES
from numprune.quantization import Scheme, schemes_by_block, ungrouped
from numprune.quantization.compressed_tensors import QuantizationConfig
from numprune.target import not_split

# Head sizes of vLLM 0.32's CPU attention kernels. GPUs support more, so another size is reported, not refused.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def export(source: Path, out: Path, *, shard_size: str = "5GB", dtype: str | None = None) -> manifest.Manifest:
    """Write the checkpoint `source` to the new folder `out`, in shards of at most `shard_size`.

    Args:
        shard_size: a number with KB, MB or GB.
        dtype: to cast every tensor to, one of `precision.DTYPES`; None: no cast.

    Raises:
        InputError: `out` exists, vLLM has no class for the architecture or would read the tokenizer differently, or the
            checkpoint is quantized and `dtype` is given.
        IntegrityError: a tensor contradicts the configuration, before or after, or has a value too large for `dtype`.
    """
    if dtype is not None:
        compressed_tensors.refuse_quantized(source, f"dtype={dtype}")
    config = checkpoint.read_config(source)
    facts: dict[str, JsonValue] = {
        "shard_size": shard_size,
        "dtype": dtype or name_of(config.dtype),
        **serving_facts(source),
    }
    headers = checkpoint.audit(source)
    if problem := other_reading(source):
        raise InputError(problem)
    parents = {"checkpoint": manifest.folder_digest(source)}
    with manifest.creating(out, kind="vllm", parents=parents, facts=facts) as folder:
        if dtype is None:
            tensors = {name: read_tensor(header) for name, header in stored_parts(headers).items()}
            save_torch_state_dict(tensors, folder, max_shard_size=shard_size)
        else:
            _cast(headers, folder, precision.DTYPES[dtype], shard_size)
        checkpoint.copy_around_weights(config, source, folder)
        if dtype is not None:
            config.dtype = precision.DTYPES[dtype]
            write_config(config, source, folder)
            card_changes.set_precision(folder)
        checkpoint.audit(folder)
    return manifest.read(out)


def _cast(headers: Mapping[str, TensorHeader], folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write every tensor in `dtype`, with one slab of rows in memory at a time."""
    shard_bytes = int(shard_size[:-2]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[shard_size[-2:]]
    with writing(folder, dict.fromkeys(headers, dtype), shard_bytes) as writer:
        for name, header in headers.items():
            writer.add_slabs(name, header.shape, slabs(header))


def serving_facts(folder: Path) -> dict[str, JsonValue]:
    """Return the `preflight` of the checkpoint in `folder`, with its task's options in `needs`. Raises InputError."""
    config = checkpoint.read_config(folder)
    pooling = vllm_pooling.options(read_anatomy(config), load_task(folder))
    facts = preflight(config, compressed_tensors.quantization_in(folder))
    return {**facts, "needs": list(pooling)} if pooling else facts


def check_per_layer(anatomy: Anatomy) -> None:
    """Refuse a family that vLLM runs only with the same sizes in all layers. Raises InputError."""
    if not FAMILIES[anatomy.family].vllm.per_layer:
        able = ", ".join(name for name, family in FAMILIES.items() if family.vllm.per_layer)
        raise InputError(
            f"vLLM does not run {anatomy.family} with layers of different sizes; numprune-vllm runs those of {able}. "
            "Prune with --allocation uniform, or leave vllm out"
        )


def check_settings(config: Any) -> None:
    """Refuse a model that vLLM does not run, or with settings that vLLM's class ignores. Raises InputError."""
    family = family_of(config)
    if not family.vllm.runs:
        raise InputError(f"vLLM does not run {family.name}; leave vllm out")
    refused = family.vllm.refused(config)
    if refused and not family.vllm.backend:
        raise InputError(
            f"vLLM does not run {family.name} with {' and '.join(f'{name}=True' for name in refused)}; leave vllm out"
        )
    if family.vllm.alternating:
        misplaced = [
            index for index, kind in enumerate(config.layer_types) if (kind == "sliding_attention") != (index % 2 == 0)
        ]
        if misplaced:
            raise InputError(
                f"layer_types: vLLM's class for {family.name} gives layers 0, 2, 4, … a sliding window and the others "
                f"none, but layer {misplaced[0]} has {config.layer_types[misplaced[0]]}; keep the order, or leave vllm "
                "out"
            )


def check_quantized(scheme: Scheme, dtype: torch.dtype | None, device: str) -> None:
    """Refuse a scheme that vLLM's kernels do not run on this device (cpu or gpu) with this data type.

    Raises InputError.
    """
    if device == "cpu" and scheme.is_float:
        raise InputError(
            "vLLM runs FP8 weights on GPUs and only on CPUs with AMX; choose w8a8 or w4a16, or serve on a GPU"
        )
    if dtype == torch.float32 and (device != "cpu" or not scheme.rounds_inputs):
        raise InputError(
            f"the model is stored in float32, and vLLM's kernels for {scheme.name} on a {device.upper()} compute in "
            "bfloat16 or float16; quantize a checkpoint stored in one of these"
            + ("" if scheme.rounds_inputs else ", or choose w8a8 for CPUs")
        )


def _runs(scheme: Scheme, dtype: torch.dtype | None, device: str) -> bool:
    try:
        check_quantized(scheme, dtype, device)
    except InputError:
        return False
    return True


def preflight(config: Any, quantized: QuantizationConfig | None = None) -> dict[str, JsonValue]:
    """Return the facts that decide whether and how vLLM can serve a model of this configuration.

    Returns:
        `architecture`, `head_size`.
        `query_heads`, `kv_heads`, `intermediate_size`: of each layer, 0 if it has no such block; the last only for
            layers with an MLP.
        `experts`, `channels_per_expert`: of each layer that has experts.
        `head_shapes`: the number of different pairs of query and KV heads; each after the first costs vLLM a metadata
        build per step.
        `quantization`: the schemes, or None if the weights are not quantized.
        `tensor_parallel`: the sizes up to 8 that divide every layer's heads, widths and groups of channels.
        `needs`: options that the server must be started with; `plugin`: whether it needs numprune-vllm.
        `cpu`: whether vLLM's CPU kernels support the head size and the schemes.

    Raises:
        InputError: vLLM cannot load it.
    """
    anatomy = read_anatomy(config)
    schemes = schemes_by_block(anatomy, quantized) if quantized else {}
    check_settings(config)
    plugin = config.model_type.startswith(PER_LAYER_PREFIX)
    if plugin:
        check_per_layer(anatomy)
    family = FAMILIES[anatomy.family]
    if family.experts and not family.shared and getattr(config, family.shared_width, None):
        raise InputError(
            f"config.json: {family.shared_width} is set, but {family.name} has no shared expert; remove it, because it "
            "makes vLLM compute NaN"
        )
    attention = anatomy.of_kind("attention")
    kv_heads = [block.units for block in attention]
    query_heads = [block.units * block.members for block in attention]
    widths = [block.units for block in anatomy.of_kind("mlp")]
    sparse = anatomy.of_kind("experts")
    served = family.vllm
    # vLLM's own class may derive the head size from the hidden size.
    derived = not served.takes_head_dim and query_heads[0] * anatomy.head_dim != anatomy.hidden_size
    needs: list[JsonValue] = []
    if served.native and not plugin and (derived or served.refused(config)):
        needs = ["--model-impl", "transformers"]
    return {
        "architecture": config.architectures[0] if config.architectures else config.model_type,
        "query_heads": list(query_heads),
        "kv_heads": list(kv_heads),
        "head_size": anatomy.head_dim,
        "intermediate_size": list(widths),
        "experts": [block.units for block in sparse],
        "channels_per_expert": [block.members for block in sparse],
        "head_shapes": len({shape for shape in zip(query_heads, kv_heads, strict=True) if all(shape)}),
        "quantization": str(quantized) if quantized else None,
        "tensor_parallel": [
            size for size in (1, 2, 4, 8) if not not_split(anatomy, size) and not ungrouped(anatomy, schemes, size)
        ],
        "needs": needs,
        "plugin": plugin,
        "cpu": anatomy.head_dim in CPU_HEAD_SIZES
        and all(_runs(scheme, config.dtype, "cpu") for scheme in set(schemes.values())),
    }
