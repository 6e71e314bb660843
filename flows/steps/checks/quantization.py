"""Whether a model can be quantized as a recipe asks, and its runtimes run the result."""

from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from typing import Any

from numprune.axes import HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.byte_budget import LEVELS
from numprune.errors import InputError
from numprune.export import genai
from numprune.export.vllm import check_quantized
from numprune.flows.recipe import Recipe
from numprune.flows.sections import Quantize
from numprune.quantization import GROUP_SIZES, Scheme, check_quantizable
from numprune.quantization.lm_head import check_groups


def schemes_asked(asked: Quantize) -> list[Scheme]:
    """The schemes to which blocks may be quantized."""
    groups = asked.channels_per_scale
    return [Scheme(name, groups if name == "w4a16" else None) for name in LEVELS[asked.scheme] if name]


def quantization(recipe: Recipe, anatomy: Anatomy, config: Any) -> list[str]:
    """Problems that keep the result from being quantized or run."""
    if recipe.quantize.scheme == "none":
        return []
    asked, problems = recipe.quantize, []
    schemes = schemes_asked(asked)
    where = f"quantize.scheme = {asked.scheme!r}"
    try:
        check_quantizable(anatomy, replace(schemes[0], group_size=None))  # groups are for the target's sizes
    except InputError as error:
        problems.append(f"{where}: {error}")
    if asked.channels_per_scale and anatomy.hidden_size % asked.channels_per_scale:
        fitting = [str(size) for size in GROUP_SIZES if anatomy.hidden_size % size == 0]
        remedy = f"set it to {' or '.join(fitting)}" if fitting else "choose w8a8 or fp8"
        problems.append(
            f"quantize.group_size = {asked.channels_per_scale}: does not divide the model's hidden_size "
            f"{anatomy.hidden_size}; {remedy}"
        )
    if asked.lm_head_bits == 4:
        try:
            genai.check_lm_head(config, schemes, 4)
            for size in _hidden_sizes(recipe):
                check_groups(size)
        except InputError as error:
            problems.append(f"quantize.{error}")
        if "onnxruntime" not in recipe.export.targets:
            problems.append(
                "quantize.lm_head_bits = 4: only the export onnxruntime stores 4 bits; add it to export.targets, or "
                "leave lm_head_bits out"
            )
    formats = {*recipe.export.targets, *recipe.benchmark.runtimes}
    if "vllm" in formats:
        for scheme in schemes:
            try:
                check_quantized(scheme, config.dtype, recipe.target.device)
            except InputError as error:
                problems.append(f"{where}: {error}")
    if recipe.export.dtype != "auto":
        problems.append(f"export.dtype = {recipe.export.dtype!r}: quantized weights have their own format; omit it")
    if "tensorrt" in formats:
        problems.append(f"{where}: engines are built only from unquantized checkpoints; omit tensorrt")
    if any(scheme.rounds_inputs for scheme in schemes) and "onnx" in recipe.export.targets:
        problems.append(
            f"{where}: the graph of the export onnx rounds no activations; choose w4a16, or replace onnx with "
            "onnxruntime in export.targets"
        )
    return problems


def _hidden_sizes(recipe: Recipe) -> Iterator[int]:
    """The hidden sizes that the model may be pruned to, or if masks choose it, one that divides all of theirs."""
    asked = recipe.prune.hidden_size
    yield from asked if isinstance(asked, list) else [asked]
    if HIDDEN_SIZE in recipe.prune.axes:
        yield lcm(recipe.sizes().align, recipe.sizes().quantization_group)
