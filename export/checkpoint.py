"""Hugging Face checkpoints: read with precise errors, written atomically and audited."""

import copy
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging as transformers_logging

from numprune.anatomy import family_of, layers_path, task_name
from numprune.dtypes import name_of
from numprune.errors import InputError, IntegrityError, reason
from numprune.export.audit import audit, quantized
from numprune.export.config import copy_config, read_config, write_config
from numprune.export.files import CARD, carry, resolve
from numprune.export.headers import TensorHeader, current_name, read_headers, weight_bytes
from numprune.export.shards import SHARD_BYTES, writing
from numprune.export.tokenizer import load_tokenizer, text_tokenizer
from numprune.export.weights import dtypes_of, main_dtype, read_rows, slabs
from numprune.modeling import AUTO_OF
from numprune.plans import PLAN_FILE
from numprune.quantization import Scheme, round_inputs_of
from numprune.renumber import renumber_tensors
from numprune.surgery import NOT_BUILT, skeleton
from numprune.tensors import tensor_table

__all__ = [
    "audit",
    "check_finite",
    "check_vocabulary",
    "copy_around_weights",
    "load",
    "load_model",
    "load_tokenizer",
    "put_together",
    "quantized",
    "read_config",
    "resolve",
    "round_inputs",
    "save",
    "save_around_weights",
    "save_trained",
    "text_tokenizer",
    "weight_bytes",
]


def load(
    model: str | Path, dtype: torch.dtype = torch.float32, *, rounds_inputs: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model that reads text, as `load_model` does, and its tokenizer. Raises like it."""
    loaded, tokenizer = _load(model, dtype, rounds_inputs)
    if tokenizer is None:
        raise InputError(f"{model}: the model reads images; give one that reads text")
    return loaded, tokenizer


def load_model(model: str | Path, dtype: torch.dtype = torch.float32, *, rounds_inputs: bool = True) -> PreTrainedModel:
    """Return a model in `dtype`, in evaluation mode with its family's attention implementation.

    No code from the folder is run, and only safetensors are read. Quantized layers round their inputs if their scheme
    does, unless `rounds_inputs` is False.

    Raises:
        InputError: a file is missing or malformed, or the architecture is not supported.
        IntegrityError: stored tensors contradict the configuration (see `audit`), or are not finite.
    """
    return _load(model, dtype, rounds_inputs)[0]


def _load(
    model: str | Path, dtype: torch.dtype, rounds_inputs: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    folder = resolve(model)
    stored = audit(folder)
    tokenizer = text_tokenizer(folder)
    config = read_config(folder)
    schemes = quantized(stored)
    loaded = _dequantized(config, stored, dtype) if schemes else _stock(folder, config, dtype)
    if rounds_inputs:
        round_inputs(loaded, schemes)
    loaded.eval()
    for name, parameter in loaded.named_parameters():
        if not torch.isfinite(parameter).all():
            where = "" if dtype == torch.float32 else f" in {name_of(dtype)}; use bfloat16 or float32"
            raise IntegrityError(f"{folder}: {name} has values that are NaN or infinite{where}")
    check_vocabulary(folder, tokenizer, loaded.config)
    return loaded, tokenizer


def _stock(folder: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model with transformers."""
    task = task_name(config)
    # The folder's generation settings are not read; they need not even be valid.
    generation = {"generation_config": GenerationConfig()} if task == "causal-lm" else {}
    try:
        with _without_bars():
            loaded: PreTrainedModel = AUTO_OF[task].from_pretrained(
                folder,
                config=config,
                **generation,
                dtype=dtype,
                attn_implementation=family_of(config).attention_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (MemoryError, OSError, RuntimeError):
        raise
    except Exception as error:  # as in `skeleton`
        raise InputError(f"{NOT_BUILT}: {reason(error)}") from error
    return loaded


def _dequantized(config: Any, stored: Mapping[str, TensorHeader], dtype: torch.dtype) -> PreTrainedModel:
    """Read a quantized model with dequantized weights."""
    model = skeleton(config)
    tied = model.all_tied_weights_keys
    found = {name: parts for name, parts in tensor_table(config).parts.items() if name not in tied}
    state: dict[str, Tensor] = {}
    for parts in found.values():
        state |= put_together(model, {part: read_rows(stored[part]).to(dtype) for part in parts})
    model.load_state_dict(state, strict=False, assign=True)  # none is missing: `audit` has compared the names
    model.tie_weights()
    if model.can_generate():
        model.generation_config = GenerationConfig()
    return model


def round_inputs(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Make the layers of these weights round their inputs, if their scheme does so."""
    for name, scheme in schemes.items():
        round_inputs_of(model.get_submodule(name.removesuffix(".weight")), scheme)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bar, which would disturb the output; reading takes only seconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase | None, config: Any) -> None:
    """Raise InputError if the tokenizer has tokens that the model lacks; None: the model reads images."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:  # without added tokens, which need not occur
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json says vocab_size="
            f"{config.vocab_size}; they do not belong together"
        )


def check_finite(stored: Mapping[str, TensorHeader]) -> None:
    """Read every value. Raises IntegrityError naming a tensor with NaN or infinity, or a truncated file."""
    for name, header in stored.items():
        if not all(torch.isfinite(slab.float()).all() for slab in slabs(header)):  # that float64 may exceed
            raise IntegrityError(f"{header.file}: {name} has values that are NaN or infinite")


def save(
    model: PreTrainedModel,
    source: Path,
    folder: Path,
    *,
    dropped: Collection[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model`, derived from the checkpoint `source`, as a checkpoint into `folder`, and audit it.

    Every tensor is stored in its data type in `source`; `model` lacks the layers `dropped` of it.
    Raises InputError, IntegrityError.
    """
    folder.mkdir(exist_ok=True)
    _save_weights(model, source, folder, dropped, shard_bytes)
    save_around_weights(model, source, folder)


def save_trained(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write `model`, which differs from the checkpoint `source` only in its weights, into `folder`, and audit it.

    Every tensor is stored in its data type in `source`. Raises InputError, IntegrityError.
    """
    _save_weights(model, source, folder)
    copy_around_weights(read_config(source), source, folder)
    audit(folder)


def _save_weights(
    model: PreTrainedModel,
    source: Path,
    folder: Path,
    dropped: Collection[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    before = tensor_table(read_config(source)).tied
    dtypes = renumber_tensors(dtypes_of(audit(source), before), layers_path(model.config), dropped)
    with writing(folder, dtypes, shard_bytes) as writer:
        writer.add(stored_tensors(model, tensors))


def save_around_weights(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Complete a checkpoint whose weights are already in `folder`, and audit it.

    Only the configuration of `model` is used, so it may be on the meta device. All files except config.json are copied
    from the folder `source`. Raises InputError, IntegrityError.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = main_dtype(read_headers(folder))
    write_config(model.config, source, folder)
    carry(source, folder)
    audit(folder)


def copy_around_weights(config: Any, source: Path, folder: Path) -> None:
    """Copy all files except weights of the checkpoint `source`, whose configuration is `config`, into `folder`."""
    copy_config(config, source, folder)
    carry(source, folder)
    if (source / PLAN_FILE).is_file():  # a numprune checkpoint, whose card describes it
        for name in (PLAN_FILE, CARD):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the model by name in a checkpoint, split into parts where the checkpoint does."""
    return {current_name(name): value for name, value in revert_weight_conversion(model, dict(tensors)).items()}


def put_together(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a checkpoint as those of the model, merging all parts of a tensor at once.

    The inverse of `stored_tensors`: a model has the experts of a layer in one tensor.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result: dict[str, Tensor] = {}
    merged: dict[str, WeightConverter] = {}
    for name, tensor in stored.items():
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            result[renamed] = tensor
        else:
            merged.setdefault(renamed, copy.deepcopy(by_pattern[pattern])).add_tensor(renamed, name, pattern, tensor)
    for renamed, converter in merged.items():
        result |= converter.convert(renamed, model=model, config=model.config)
    return result
