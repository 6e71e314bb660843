"""What a manifest needs to know of a release; no weights are read."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.serving import reference_answers
from numprune.serving.problems import problems
from numprune.serving.registry import Registry
from numprune.serving.registry.releases import CHECKPOINT, reading
from numprune.serving.vllm import needs

_KIND = "vllm"  # kind of a checkpoint exported for vLLM
_MANIFEST = f"{CHECKPOINT}/{manifest.FILE_NAME}"
_CONFIG = f"{CHECKPOINT}/config.json"
_MAXIMUM_CONFIG_BYTES = 16 << 20
_Dtype = Literal["float32", "bfloat16", "float16"]


class _Facts(BaseModel):
    """Facts recorded by the exporter."""

    model_config = ConfigDict(extra="ignore", strict=True)

    needs: list[str] = []
    plugin: bool = False
    tensor_parallel: Annotated[list[int], Field(min_length=1)]
    cpu: bool


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    dtype: _Dtype = "float32"


@dataclass(frozen=True)
class ServedRelease:
    """A version in the registry.

    Attributes:
        name, version, digest: which one; the digest is its manifest's and so covers every byte.
        run: of the report with its passing verdict.
        size_bytes, weight_bytes: of all its files, and of the tensors that vLLM loads.
        dtype: of the stored weights, in which the release was measured.
        options: that vLLM needs to load the checkpoint.
        plugin: vLLM needs the plug-in, because the layers differ in size.
        tensor_parallel: numbers of GPUs over which its heads and widths can be split.
        cpu: whether vLLM's CPU kernels support its head size.
    """

    name: str
    version: int
    digest: str
    run: str
    size_bytes: int
    weight_bytes: int
    dtype: str
    options: tuple[str, ...]
    plugin: bool
    tensor_parallel: tuple[int, ...]
    cpu: bool

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"


def read_release(registry: Registry, reference: str) -> ServedRelease:
    """The release that a reference currently means; a bare name means production. All files read are verified.

    Raises InputError (no such version, one that was not exported for vLLM, one without reference answers),
    IntegrityError.
    """
    with reading(registry, reference, [_MANIFEST, _CONFIG]) as (version, whole, folder):
        if whole.files.keys().isdisjoint(reference_answers.FILE_NAMES):
            raise InputError(
                f"{version.reference}: has no reference answers ({reference_answers.FILE_NAME}); masked language "
                "models and image generators cannot be served. Other releases without them were made by an earlier "
                "version: run `numprune optimize` again"
            )
        exported = manifest.read(folder / CHECKPOINT)
        if whole.files[_CONFIG].size > _MAXIMUM_CONFIG_BYTES:
            raise IntegrityError(f"{version.reference}, {_CONFIG}: exceeds the {_MAXIMUM_CONFIG_BYTES:,}-byte limit")
        config = (folder / _CONFIG).read_bytes()
    if exported.kind != _KIND:
        raise InputError(
            f"{version.reference}: its checkpoint was not exported for vLLM; add 'vllm' to the recipe's export.targets"
        )
    try:
        facts = _Facts.model_validate(dict(exported.facts))
        dtype = _Config.model_validate_json(config).dtype
    except ValidationError as error:
        raise IntegrityError(f"{version.reference}, {_MANIFEST} and {_CONFIG}: {problems(error)}") from None
    return ServedRelease(
        name=version.name,
        version=version.version,
        digest=version.digest,
        run=version.tags.get("numprune.run", ""),
        size_bytes=sum(entry.size for entry in whole.files.values()),
        weight_bytes=sum(entry.size for name, entry in exported.files.items() if name.endswith(".safetensors")),
        dtype=dtype,
        options=needs.checked(facts.needs, f"{version.reference}, {_MANIFEST}"),
        plugin=facts.plugin,
        tensor_parallel=tuple(facts.tensor_parallel),
        cpu=facts.cpu,
    )
