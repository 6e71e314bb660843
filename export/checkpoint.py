"""Checkpoints: Hugging Face folders, read with every mistake named, written whole, audited tensor by tensor."""

import copy
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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

from numprune.anatomy import family_of, layers_path, read_anatomy, task_name
from numprune.errors import InputError, IntegrityError
from numprune.export import files
from numprune.export.config import copy_config, read_config, reason, write_config
from numprune.export.files import CARD, DOWNLOADED, carry
from numprune.export.precision import name_of
from numprune.export.shards import SHARD_BYTES, writing
from numprune.export.tokenizer import load_tokenizer
from numprune.export.weights import (
    QuantizedHeader,
    TensorHeader,
    current_name,
    dtypes_of,
    main_dtype,
    read_headers,
    read_rows,
    slabs,
    weight_bytes,
)
from numprune.modeling import AUTO_OF
from numprune.plans import PLAN_FILE
from numprune.quantization import Scheme, compressed_tensors, quantized_tensors, round_inputs_of
from numprune.renumber import renumber_tensors
from numprune.surgery import skeleton

__all__ = [
    "audit",
    "check_finite",
    "check_vocabulary",
    "copy_around_weights",
    "load",
    "load_tokenizer",
    "put_together",
    "quantized",
    "read_config",
    "resolve",
    "round_inputs",
    "save",
    "save_around_weights",
    "save_trained",
    "stored_names",
    "weight_bytes",
]


def resolve(model: str | Path) -> Path:
    """The local folder of a model: itself, or a hub id's files, downloaded (no code, safetensors only).

    Raises InputError when there is no such folder and the hub does not give it either.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        raise InputError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(model), allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: no such folder, and not available from the hub ({first})") from None


def load(
    model: str | Path, dtype: torch.dtype = torch.float32, *, rounds_inputs: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in `dtype`, in evaluation mode, with the attention that its family is walked with, and its tokenizer.

    No code from the folder is run, and only safetensors are read. Quantized layers round their inputs where their
    scheme does, unless `rounds_inputs` is False.

    Raises:
        InputError: a file is missing or malformed, or the architecture is not supported.
        IntegrityError: what is stored is not what the configuration says (see `audit`), or is not finite.
    """
    folder = resolve(model)
    stored = audit(folder)
    tokenizer = load_tokenizer(folder)
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
    """Read a model as transformers does."""
    task = task_name(config)
    # The folder's generation settings, which need not even be valid, are not read.
    generation = {"generation_config": GenerationConfig()} if task == "causal-lm" else {}
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
    return loaded


def _dequantized(config: Any, stored: Mapping[str, TensorHeader], dtype: torch.dtype) -> PreTrainedModel:
    """Read a quantized model: the weights that it computes with, in floating point."""
    model = skeleton(config)
    tied = model.all_tied_weights_keys
    found = {name: parts for name, parts in stored_names(model).items() if name not in tied}
    state: dict[str, Tensor] = {}
    for parts in found.values():
        state |= put_together(model, {part: read_rows(stored[part]).to(dtype) for part in parts})
    model.load_state_dict(state, strict=False, assign=True)  # all are there: `audit` has compared the names
    model.tie_weights()
    if model.can_generate():
        model.generation_config = GenerationConfig()
    return model


def quantized(stored: Mapping[str, TensorHeader]) -> dict[str, Scheme]:
    """Return the quantized ones among the stored weights, with their scheme."""
    return {name: header.scheme for name, header in stored.items() if isinstance(header, QuantizedHeader)}


def round_inputs(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Have the layers of these weights round their inputs, where their scheme does."""
    for name, scheme in schemes.items():
        round_inputs_of(model.get_submodule(name.removesuffix(".weight")), scheme)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Reading a checkpoint takes seconds; a bar of transformers would stand between our own lines."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raises InputError when the tokenizer has tokens that the model does not."""
    if tokenizer.vocab_size > config.vocab_size:  # without added tokens: those need not occur
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json says vocab_size="
            f"{config.vocab_size}; they do not belong together"
        )


def check_finite(stored: Mapping[str, TensorHeader]) -> None:
    """Read every value. Raises IntegrityError naming a tensor that holds NaN or infinity, or a file that is cut off."""
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
    """Write `model`, which was made from that in `source`, as a checkpoint into `folder` and audit what was written.

    Every tensor is stored in the data type that it has in `source`, of which `model` has not the layers `dropped`.
    Raises InputError, IntegrityError.
    """
    folder.mkdir(exist_ok=True)
    _save_weights(model, source, folder, dropped, shard_bytes)
    save_around_weights(model, source, folder)


def save_trained(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write `model`, which has other weights than that in `source` and nothing else, into `folder`, and audit it.

    Every tensor is stored in the data type that it has in `source`. Raises InputError, IntegrityError.
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
    dtypes = renumber_tensors(dtypes_of(audit(source)), layers_path(model.config), dropped)
    with writing(folder, dtypes, shard_bytes) as writer:
        writer.add(stored_tensors(model, tensors))


def save_around_weights(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Complete a checkpoint whose weights are in `folder` already, and audit it.

    Of `model` only the configuration is used, so it may be on the meta device. All files but config.json are those of
    the folder `source`. Raises InputError, IntegrityError.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = main_dtype(read_headers(folder))
    write_config(model.config, source, folder)
    carry(source, folder)
    audit(folder)


def copy_around_weights(config: Any, source: Path, folder: Path) -> None:
    """Copy all but the weights of the checkpoint `source`, whose configuration was read as `config`, into `folder`."""
    copy_config(config, source, folder)
    carry(source, folder)
    if (source / PLAN_FILE).is_file():  # a checkpoint of ours, whose card is about itself
        for name in (PLAN_FILE, CARD):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def audit(folder: Path) -> dict[str, TensorHeader]:
    """Compare every stored tensor with the configuration: nothing missing, extra, larger or smaller.

    A tensor larger than the configuration says is the dangerous one: vLLM loads it truncated, without an error. Tied
    weights may be stored once, or twice and equal.

    Returns:
        The headers of the stored tensors, by name.

    Raises:
        InputError: config.json or the weights are not there, or the architecture is not supported.
        IntegrityError: names the tensor or the file.
    """
    config = read_config(folder)
    expected, tied, base = _expected_shapes(config)
    stored = _with_base(read_headers(folder), expected, base)
    computed = family_of(config).computed
    for name in sorted(expected.keys() | stored.keys()):
        if name not in expected:
            if not name.endswith(computed):
                raise IntegrityError(
                    f"{stored[name].file}: {name} stored, but the model that config.json describes has no such tensor"
                )
            del stored[name]
        elif name not in stored:
            if tied.get(name) not in stored:
                raise IntegrityError(f"{folder}: {name} {list(expected[name])} is missing, but config.json needs it")
        elif stored[name].shape != expected[name]:
            raise IntegrityError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, but config.json implies "
                f"{list(expected[name])}"
            )
    _require_quantized(folder, config, stored)
    _require_linear(config, quantized(stored), stored)
    for name, source in tied.items():
        if name in stored and source in stored and not _equal(stored[name], stored[source]):
            raise IntegrityError(
                f"{stored[name].file}: {name} differs from {source}, but config.json ties them; "
                'set "tie_word_embeddings": false there if both are intended, or remove the stale one'
            )
    return stored


def _require_quantized(folder: Path, config: Any, stored: Mapping[str, TensorHeader]) -> None:
    """Raises IntegrityError where config.json says that a weight is quantized, and it is stored in full."""
    content = files.read_object(folder / files.CONFIG)
    said = compressed_tensors.read_quantization(content)
    if said is None:
        return
    for name in quantized_tensors(read_anatomy(config)):
        scheme = said.scheme(name.removesuffix(".weight"))
        full = name in stored and not isinstance(stored[name], QuantizedHeader)
        if full and scheme is not None:
            raise IntegrityError(
                f"{stored[name].file}: {name} is not quantized, but quantization_config in config.json says {scheme}; "
                "they do not belong together"
            )


def _require_linear(config: Any, schemes: Mapping[str, Scheme], stored: Mapping[str, TensorHeader]) -> None:
    """Raises IntegrityError where what is stored quantized is not the weight of a Linear layer."""
    modules = dict(skeleton(config).named_modules()) if schemes else {}
    for name in schemes:
        if not isinstance(modules.get(name.removesuffix(".weight")), nn.Linear):
            raise IntegrityError(
                f"{stored[name].file}: {name} is quantized, but it is not the weight of a Linear layer; "
                "quantize the unquantized checkpoint with numprune quantize"
            )


def _equal(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two tensors of one shape are stored alike."""
    return one.dtype == other.dtype and all(a.equal(b) for a, b in zip(slabs(one), slabs(other), strict=True))


def _with_base(
    stored: dict[str, TensorHeader], expected: Mapping[str, tuple[int, ...]], base: str
) -> dict[str, TensorHeader]:
    """Name tensors as a whole model does that were stored by its part without a head, whose name is `base`."""
    if any(name.startswith(base) for name in stored):
        return stored
    return {base + name if base + name in expected else name: header for name, header in stored.items()}


def stored_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return the name of every tensor in the model -> the names in a checkpoint of what it is put together from."""
    state = {name: torch.empty_like(value, device="meta") for name, value in model.state_dict().items()}
    if revert_weight_conversion(model, state) is state:
        return {name: (name,) for name in state}
    return {name: tuple(stored_tensors(model, {name: value})) for name, value in state.items()}


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the model by their names in a checkpoint, what is stored in parts as these."""
    return {current_name(name): value for name, value in revert_weight_conversion(model, dict(tensors)).items()}


def put_together(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a checkpoint, all that a tensor of the model is made of at once, as the model has them.

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


def _expected_shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str], str]:
    """Of the model that `config` describes: shapes by name, tied names with their source, the prefix without a head.

    All by the names in a checkpoint.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about sizes that we check ourselves
    try:
        with torch.device("meta"):
            model = AUTO_OF[task_name(config)].from_config(config, trust_remote_code=False)
    except Exception as error:  # as in `read_config`
        raise InputError(f"config.json: transformers cannot build a model from it: {reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    shapes = {name: tuple(value.shape) for name, value in stored_tensors(model, model.state_dict()).items()}
    names = stored_names(model)
    tied = {names[name][0]: names[source][0] for name, source in model.all_tied_weights_keys.items()}
    return shapes, tied, f"{model.base_model_prefix}."
