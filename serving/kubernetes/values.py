"""The cluster's requirements for a pod: a file of values under Kubernetes' own names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from numprune.errors import InputError
from numprune.serving.problems import problems
from numprune.serving.vllm import api_key

Json = dict[str, Any]

_MAXIMUM_BYTES = 1 << 20
_SECRET = re.compile(r"(API_KEY|TOKEN|PASSWORD|SECRET|SECRET_ACCESS_KEY)$")

_LABEL = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DNS = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

Name = Annotated[str, Field(pattern=rf"^{_DNS}(\.{_DNS})*$", max_length=253)]
Key = Annotated[str, Field(pattern="^[-._a-zA-Z0-9]+$", max_length=253)]
LabelName = Annotated[str, Field(pattern=rf"^({_DNS}(\.{_DNS})*/)?{_LABEL}$", max_length=317)]
LabelValue = Annotated[str, Field(pattern=f"^({_LABEL})?$")]
Id = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        alias_generator=to_camel,
        serialize_by_alias=True,
    )

    def to_json(self) -> Json:
        """In the form of a manifest."""
        return self.model_dump(exclude_none=True)


class Toleration(_Model):
    """A toleration; `value` needs `operator: Equal`, `toleration_seconds` needs `effect: NoExecute`."""

    key: LabelName | None = None
    operator: Literal["Equal", "Exists"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("value must be omitted with operator Exists")
        if self.operator != "Exists" and self.key is None:
            raise ValueError("operator must be Exists if there is no key")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("tolerationSeconds needs effect NoExecute")
        return self


class Named(_Model):
    name: Name


class KeyOf(Named):
    """One entry of a Secret or a ConfigMap."""

    key: Key


class FieldOf(_Model):
    field_path: Annotated[str, Field(min_length=1, max_length=253)]


class ValueFrom(_Model):
    """Exactly one source."""

    secret_key_ref: KeyOf | None = None
    config_map_key_ref: KeyOf | None = None
    field_ref: FieldOf | None = None

    @model_validator(mode="after")
    def _one(self) -> "ValueFrom":
        if len(self.model_fields_set) != 1:
            raise ValueError("must be one of secretKeyRef, configMapKeyRef and fieldRef")
        return self


class Variable(_Model):
    """An environment variable: a value or its source. Secrets do not belong in a manifest."""

    name: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=253)]
    value: str | None = None
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_and_not_secret(self) -> "Variable":
        if self.name == api_key.VARIABLE:
            raise ValueError("must be given with --api-key-secret: the check of the server needs it, too")
        if (self.value is None) == (self.value_from is None):
            raise ValueError("must have either value or valueFrom")
        if self.value is not None and _SECRET.search(self.name):
            raise ValueError("is a secret: must be from a Secret, with valueFrom.secretKeyRef")
        return self


class SecurityContext(_Model):
    """Of the pod. Without it, the cluster or the images choose the user, which must not be root."""

    run_as_user: Annotated[Id, Field(ge=1)] | None = None
    run_as_group: Id | None = None
    fs_group: Id | None = None
    supplemental_groups: list[Id] | None = None


def _once(variables: list[Variable]) -> list[Variable]:
    names = [variable.name for variable in variables]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: must be given only once")
    return variables


Variables = Annotated[list[Variable], AfterValidator(_once)]


class Values(_Model):
    """Everything is optional.

    Attributes:
        env, fetch_env: of vLLM's container and of the one that fetches the release; they override ours of the same
            name.
        release_claim: a PersistentVolumeClaim for releases, one folder each; by default each pod keeps its own copy.
    """

    node_selector: dict[LabelName, LabelValue] = {}
    tolerations: list[Toleration] = []
    image_pull_secrets: list[Named] = []
    security_context: SecurityContext = SecurityContext()
    env: Variables = []
    fetch_env: Variables = []
    release_claim: Name | None = None

    def pod_fields(self) -> Json:
        """Fields that go into the pod's spec unchanged."""
        fields: Json = {
            "nodeSelector": self.node_selector,
            "tolerations": [one.to_json() for one in self.tolerations],
            "imagePullSecrets": [one.to_json() for one in self.image_pull_secrets],
        }
        return {name: value for name, value in fields.items() if value}


def read_values(path: Path) -> Values:
    """Read a YAML file of values. Raises InputError naming every problem."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAXIMUM_BYTES + 1)
    except OSError as error:
        raise InputError(f"--values {path}: cannot be read: {error.strerror}") from None
    if len(raw) > _MAXIMUM_BYTES:
        raise InputError(f"--values {path}: exceeds the {_MAXIMUM_BYTES}-byte limit")
    try:
        found = yaml.safe_load(raw)
        return Values.model_validate({} if found is None else found)
    except ValidationError as error:
        raise InputError(f"--values {path}: {problems(error, secret=('env', 'fetchEnv'))}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # the message would quote the file, which may contain a secret
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"--values {path}{line}: not YAML: {getattr(error, 'problem', type(error).__name__)}"
        ) from None


def merged(ours: Json, theirs: Sequence[Variable]) -> list[Json]:
    """The variables of a container; given ones replace ours of the same name."""
    given = {variable.name for variable in theirs}
    kept: list[Json] = [{"name": name, "value": value} for name, value in ours.items() if name not in given]
    return [*kept, *(variable.to_json() for variable in theirs)]
