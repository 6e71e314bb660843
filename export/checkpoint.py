"""Checkpoints: Hugging Face folders, read with every mistake named, written whole, audited tensor by tensor."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import numprune.modeling  # noqa: F401 - registers the per-layer classes
from numprune.anatomy import read_anatomy
from numprune.errors import InputError, IntegrityError
from numprune.export.weights import TensorHeader, read_headers, slabs, weight_bytes

__all__ = [
    "PLAN",
    "audit",
    "check_finite",
    "check_vocabulary",
    "load",
    "load_tokenizer",
    "read_config",
    "read_generation_config",
    "resolve",
    "save",
    "save_around_weights",
    "weight_bytes",
]

GENERATION = "generation_config.json"
PLAN = "numprune_plan.json"  # kept beside the weights of a pruned checkpoint

# Buffers that older versions of transformers stored and newer ones compute; every loader, vLLM's too, ignores them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
MAXIMUM_CONFIG_BYTES = 16 << 20  # these are checked before a file is parsed
MAXIMUM_TOKENIZER_BYTES = 512 << 20
_SAMPLE = "The 27 numbers, e.g. 3.14:\n\tdef f(x):  return x**2  # naïve — 数"


def resolve(model: str | Path) -> Path:
    """The local folder of a model: itself, or a hub id's files, downloaded (no code, safetensors only).

    Raises InputError when there is no such folder and the hub does not give it either.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise InputError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: no such folder, and the hub does not give it either ({reason})") from None


def read_config(folder: Path) -> Any:
    """The configuration of a supported architecture; nothing else is read. Raises InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; a model is a folder with config.json, safetensors weights and a tokenizer")
    _require_size(path, MAXIMUM_CONFIG_BYTES)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes transformers raise, it is the file that is at fault
        raise InputError(f"{path}: transformers cannot read it: {_reason(error)}") from error
    read_anatomy(config)
    return config


def _require_size(path: Path, maximum: int) -> None:
    if not path.is_file():  # a link to a device has no end
        raise InputError(f"{path}: not a regular file")
    if path.stat().st_size > maximum:
        raise InputError(f"{path}: larger than {maximum} bytes, no such file is")


def _reason(error: BaseException) -> str:
    """The last line of an error of transformers, which says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


def load(model: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in `dtype`, in evaluation mode, with SDPA attention, and its tokenizer.

    No code from the folder is run, and only safetensors are read.

    Raises:
        InputError: a file is missing or malformed, or the architecture is not supported.
        IntegrityError: what is stored is not what the configuration says (see `audit`), or is not finite.
    """
    folder = resolve(model)
    audit(folder)
    tokenizer = load_tokenizer(folder)
    read_generation_config(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    for name, parameter in loaded.named_parameters():
        if not torch.isfinite(parameter).all():
            raise IntegrityError(f"{folder}: {name} has values that are NaN or infinite")
    check_vocabulary(folder, tokenizer, loaded.config)
    return loaded, tokenizer


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """How the model is asked to generate, or None where nothing says it.

    Raises InputError, also for what transformers takes with a warning and then refuses to write with the pruned model.
    """
    path = folder / GENERATION
    if not path.exists():
        return None
    _require_size(path, MAXIMUM_CONFIG_BYTES)
    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        found.validate(strict=True)
    except Exception as error:  # as in read_config
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{path}: transformers refuses it: {reason}; mend it, or remove it: the model then has the defaults"
        ) from error
    return found


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
        if not all(torch.isfinite(slab).all() for slab in slabs(header)):
            raise IntegrityError(f"{header.file}: {name} has values that are NaN or infinite")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises InputError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{folder}: no tokenizer (tokenizer.json) there; copy it from the model's origin")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja") and not path.is_dir():
            _require_size(path, MAXIMUM_TOKENIZER_BYTES)
    try:
        # Its chat template is text to us: nothing here renders it.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # as in read_config; and a panic of the tokenizers' Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{folder}: transformers cannot read its tokenizer: {_reason(error)}") from error


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint into `folder` (inside `manifest.creating`) and audit what was written.

    `dtype` casts the model's parameters first, in place: what stays in memory is what was saved. Buffers keep their
    precision. Raises IntegrityError.
    """
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_tokenizer(tokenizer, folder)


def save_around_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype
) -> None:
    """Complete a checkpoint whose weights, in `dtype`, are in `folder` already, and audit it.

    Of `model` only the configurations are used, so it may be on the meta device. Raises IntegrityError.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Complete a checkpoint with its tokenizer and audit it."""
    tokenizer.save_pretrained(folder)
    audit(folder)
    # transformers chooses the tokenizer's class by the model type too, which pruning may have changed.
    if load_tokenizer(folder).encode(_SAMPLE) != tokenizer.encode(_SAMPLE):
        raise IntegrityError(f"{folder}: its tokenizer, read back, gives other tokens than the one that was saved")


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
    stored = read_headers(folder)
    expected, tied = _expected_shapes(config)
    for name in sorted(expected.keys() | stored.keys()):
        if name not in expected:
            if not _COMPUTED.search(name):
                raise IntegrityError(
                    f"{stored[name].file}: {name} has no place in the model that config.json describes"
                )
        elif name not in stored:
            if tied.get(name) not in stored:
                raise IntegrityError(f"{folder}: {name} {list(expected[name])} is not stored, but config.json needs it")
        elif stored[name].shape != expected[name]:
            raise IntegrityError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, but config.json means "
                f"{list(expected[name])}"
            )
    for name, source in tied.items():
        if name in stored and source in stored and not _equal(stored[name], stored[source]):
            raise IntegrityError(f"{stored[name].file}: {name} differs from {source}, but config.json ties them")
    return stored


def _equal(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two tensors of one shape are stored alike."""
    return one.dtype == other.dtype and all(a.equal(b) for a, b in zip(slabs(one), slabs(other), strict=True))


def _expected_shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by tensor name, and tied names with their source, of the model that `config` describes."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about sizes that we check ourselves
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as in read_config
        raise InputError(f"config.json: transformers cannot make a model of it: {_reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, dict(model.all_tied_weights_keys)
