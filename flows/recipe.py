"""The recipe of `numprune optimize`: TOML, one model per section, all problems reported together.

This module only reads and validates the recipe; `checks` decides whether files, model and runtimes support it.
"""

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from numprune.errors import InputError
from numprune.flows.names import EMBEDDED, LEARNING_RATE, ROOFLINE, TrainedWeights
from numprune.flows.sections import (
    NO_FILE,
    Benchmark,
    BlockTimings,
    Data,
    Evaluate,
    Export,
    Learn,
    Model,
    Prune,
    Quantize,
    Recover,
    Registry,
    Section,
    Target,
)
from numprune.served import Served, served_as
from numprune.serving.gates import Gate
from numprune.serving.problems import described, listed
from numprune.target import Target as SizeTarget

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED_RECIPE = EMBEDDED_FOLDER / "recipe.toml"
_MAXIMUM_BYTES = 1 << 20


class Recipe(Section):
    """A whole recipe; every path in it is absolute. Gates have no default: every release must be gated."""

    model: Model
    data: Data
    learn: Learn = Learn()
    prune: Prune = Prune()
    timings: BlockTimings = BlockTimings()
    recover: Recover = Recover()
    quantize: Quantize = Quantize()
    target: Target = Target()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    gates: Annotated[list[Gate], Field(min_length=1)]
    registry: Registry

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        asked, groups = self.target.quantization_group, self.quantize.channels_per_scale
        if groups is not None and asked not in (1, groups):
            raise ValueError(
                f"target.quantization_group = {asked}: quantize.group_size is {groups}; omit "
                "target.quantization_group, or set both to the same value"
            )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        of: dict[str, TrainedWeights] = {"rank": "lora", "blocks": "blocks"}
        for name, train in of.items():
            value, default = getattr(self.recover, name), Recover.model_fields[name].default
            if value != default and self.recover.train != train:
                raise ValueError(
                    f'recover.{name} = {value}: it has an effect only with recover.train = "{train}"; leave it out'
                )
        if self.recover.generated_share != Recover.model_fields["generated_share"].default and not self.recover.prompts:
            raise ValueError(
                f"recover.generated_share = {self.recover.generated_share}: it has an effect only with "
                "recover.prompts; leave it out"
            )
        if self.prune.basis != Prune.model_fields["basis"].default and not self.prune.hidden_size:
            raise ValueError(
                f"prune.basis = {self.prune.basis!r}: it has an effect only with prune.hidden_size; leave it out"
            )
        if self.quantize.lm_head_bits != 8 and self.quantize.scheme == "none":
            raise ValueError(
                f"quantize.lm_head_bits = {self.quantize.lm_head_bits}: it has an effect only with a quantize.scheme; "
                "leave it out"
            )
        if self.learn.learning_rate != LEARNING_RATE and self.learn.variant == "faster":
            raise ValueError(
                f"learn.learning_rate = {self.learn.learning_rate}: it is that of the weights, which "
                'learn.variant = "faster" does not train; leave it out'
            )
        return self

    @model_validator(mode="after")
    def _bits_follow_from_a_budget(self) -> Self:
        if self.quantize.scheme == "mixed" and self.prune.allowed.bytes is None:
            raise ValueError(
                'quantize.scheme = "mixed": the bits of each block follow from a budget of bytes; set prune.budget, or '
                "choose one scheme for all"
            )
        if self.prune.allowed.bytes is not None and self.export.dtype != "auto":
            raise ValueError(
                f"export.dtype = {self.export.dtype!r}: prune.budget counts the weights as they are stored; leave "
                "export.dtype out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_timed_is_released(self) -> Self:
        if self.prune.allowed.time is None:
            if self.timings != BlockTimings():
                raise ValueError("timings: it has an effect only with a time as prune.budget; leave it out")
            return self
        for field, value, measured in (
            ("prune.ratio", self.prune.ratio, 0.0),
            ("prune.allocation", self.prune.allocation, "error"),
            ("prune.window", self.prune.window, 0),
            ("benchmark.device", self.benchmark.device, "auto"),
        ):
            if value != measured:
                raise ValueError(
                    f"{field} = {value!r}: with a time as prune.budget it must be {measured!r}; leave it out, or use a "
                    "ratio"
                )
        if self.quantize.scheme == "mixed":
            raise ValueError(
                "quantize.scheme = 'mixed': latencies are of blocks in one scheme; choose one for all, or leave the "
                "time out of prune.budget"
            )
        if self.learn.constraint not in ("auto", "milliseconds"):
            raise ValueError(
                f"learn.constraint = {self.learn.constraint!r}: prune.budget limits milliseconds; leave one of them out"
            )
        for gate in self.gates if self.timings.runtime == ROOFLINE else ():
            if gate.metric.startswith(("speed.", "pruning.latency.")):
                raise ValueError(
                    f"gates: {gate.metric} can never pass, because timings.runtime = {ROOFLINE!r} only estimates "
                    "latencies; leave the gate out, or measure on the target"
                )
        if "hidden-size" in self.prune.axes:
            raise ValueError("prune.axes: a time is met by units alone; leave out hidden-size, or use a ratio")
        return self

    def sizes(self) -> SizeTarget:
        """The servers' constraints on sizes, including groups of channels that share a scale."""
        groups = self.quantize.channels_per_scale
        return replace(self.target.sizes(), **({} if groups is None else {"quantization_group": groups}))

    def served(self) -> Served:
        """How the model is served whose time `prune.budget` limits."""
        # Other runtimes compute with the rounded values of an output matrix in 4 bits.
        bits = self.quantize.lm_head_bits if self.timings.runtime == "onnxruntime" else 8
        return served_as(self.quantize.scheme, self.sizes(), bits, self.export.dtype)

    def to_toml(self) -> str:
        """The recipe with all defaults filled in, as stored in a release."""
        data = self.model_dump(mode="json", exclude_none=True)
        gates = data.pop("gates")
        tables = [(f"[{name}]", section) for name, section in data.items()] + [("[[gates]]", gate) for gate in gates]
        return "\n".join("\n".join([header, *_lines(section), ""]) for header, section in tables)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def source_of(asked: str | None) -> Path:
    """Return the file of the requested recipe, by default the embedded one."""
    return Path(asked) if asked else EMBEDDED_RECIPE


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe in `path`, changed by `overrides`.

    Args:
        path: a TOML file; paths in it are relative to its folder.
        overrides: `section.key=value`, the value in TOML syntax or as a plain string; paths are relative to the current
            folder.

    Raises:
        InputError: the file is missing or not TOML, or has invalid values; one line per problem.
    """
    data = _read(path)
    _make_absolute(data, path.parent)
    problems = [problem for override in overrides if (problem := _override(data, override))]
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += described(error, Recipe)
    if problems:
        raise InputError(listed(f"recipe {path}", problems))
    try:
        recipe.to_toml().encode()
    except UnicodeEncodeError:  # a name whose bytes are not text, which a shell can pass and a release cannot store
        raise InputError(f"recipe {path}: a name or path in it is not UTF-8; rename the file or folder") from None
    return recipe


def assignment(key: str, value: Any) -> str:
    """The override that gives `section.key` this value."""
    return f"{key}={to_text(value)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"recipe {path}: no such file") from None
    if len(raw) > _MAXIMUM_BYTES:
        raise InputError(f"recipe {path}: exceeds the {_MAXIMUM_BYTES:,}-byte limit")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's own and Unicode's errors are ValueErrors
        raise InputError(f"recipe {path}: not TOML: {error}") from None


def _override(data: dict[str, Any], override: str) -> str | None:
    """Apply `override` to `data`; return the problem, if any."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not (parts == ["gates"] or (len(parts) == 2 and all(parts))):
        return f"--set {override}: must be section.key=value, or gates=[…]"
    value = value_of(text)
    if parts == ["gates"]:
        data["gates"] = value
        return None
    section = data.setdefault(parts[0], {})
    if not isinstance(section, dict):
        return f"--set {override}: {parts[0]} has no keys that can be set"
    where = (parts[0], parts[1])
    section[parts[1]] = _anchored(value, Path.cwd(), where) if where in _PATHS else value
    return None


def value_of(text: str) -> Any:
    """`text` as a TOML value; anything else is a plain string, so that a shell needs no second pair of quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOML's own errors are ValueErrors
        return text
    return parsed["value"] if len(parsed) == 1 else text


_PATHS = {
    ("model", "path"),
    ("data", "calibration"),
    ("data", "heldout"),
    ("recover", "prompts"),
    ("evaluate", "tasks"),
    ("evaluate", "decoder"),
    ("evaluate", "fid_network"),
    ("evaluate", "fid_images"),
}
TASK_FILES = (".yaml", ".yml")


def _make_absolute(data: dict[str, Any], base: Path) -> None:
    for section, key in _PATHS:
        keys = data.get(section)
        if isinstance(keys, dict) and key in keys:
            keys[key] = _anchored(keys[key], base, (section, key))


def _anchored(value: Any, base: Path, key: tuple[str, ...]) -> Any:
    """`value` relative to `base` if it is a path; "embedded", hub ids, names and invalid values are unchanged."""
    if isinstance(value, list):
        return [_anchored(item, base, key) for item in value]
    if isinstance(value, dict):
        return {name: _anchored(item, base, key) for name, item in value.items()}
    if not isinstance(value, str) or value in ("", EMBEDDED):
        return value
    if key in (("evaluate", "decoder"), ("evaluate", "fid_network")) and value == NO_FILE:
        return value
    if key == ("evaluate", "tasks") and not value.endswith(TASK_FILES):
        return value
    try:
        path = (base / Path(value).expanduser()).absolute()
    except RuntimeError:  # an unknown ~user is a folder name
        path = (base / value).absolute()
    if key == ("model", "path") and not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value):
        return value
    return os.path.normpath(path)


def _lines(section: dict[str, Any]) -> list[str]:
    return [f"{key} = {to_text(value)}" for key, value in section.items()]


def to_text(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_text(key)} = {to_text(item)}' for key, item in value.items())}}}"
    # JSON's strings, numbers, booleans and arrays are valid TOML, except that TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace(chr(127), chr(92) + "u007f")
