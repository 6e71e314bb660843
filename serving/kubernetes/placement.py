"""Where and how to run a release: user input, validated before it enters a manifest."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from numprune.errors import InputError
from numprune.serving.kubernetes.release import ServedRelease
from numprune.serving.kubernetes.values import Values
from numprune.serving.vllm.environment import TESTED
from numprune.serving.vllm.options import split_names, taken

VLLM_IMAGE = f"vllm/vllm-openai:v{TESTED[-1]}"

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, for Services; RFC 1123 also allows a leading digit
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")  # RFC 1123
_MEMORY = re.compile(r"[1-9][0-9]{0,6}(Mi|Gi)")
_IMAGE = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_NAME_LIMIT = 53  # KServe derives NAME-predictor from it, which must be a label, too
# Options that the manifest sets itself, that would run a model's code, or that would put a secret into a manifest.
_RESERVED = (
    *("--model", "--host", "--port", "--uds", "--dtype", "--tensor-parallel-size"),
    *("--trust-remote-code", "--api-key", "--config"),
)


@dataclass(frozen=True)
class Placement:
    """Raises InputError naming every invalid field.

    Attributes:
        image: numprune's image, which fetches and verifies the release and checks the server against it.
        registry_uri: address of the MLflow server from inside the cluster.
        namespace: of the cluster.
        name: of the Deployment and Service; by default the model's name if it is valid.
        vllm_image: by default vLLM's own image of the version that numprune was tested with.
        gpus: per replica, over which the model is split; 0 runs on CPUs, with an image of vLLM's CPU build.
        cpus, memory: of each replica's vLLM container; by default, memory follows the size of the weights.
        registry_secret: a Secret whose keys are environment variables of MLflow's client (MLFLOW_TRACKING_TOKEN, …).
        api_key_secret: a Secret with the key VLLM_API_KEY: the API key that clients must send.
        options: additional vLLM options; without --served-model-name, the model is served under its registry name.
        values: the cluster's requirements for the pod.
    """

    image: str
    registry_uri: str
    namespace: str = "default"
    name: str | None = None
    vllm_image: str | None = None
    replicas: int = 1
    gpus: int = 1
    cpus: int = 4
    memory: str | None = None
    registry_secret: str | None = None
    api_key_secret: str | None = None
    options: tuple[str, ...] = ()
    values: Values = field(default_factory=Values)

    def __post_init__(self) -> None:
        problems = [
            *_image("image", self.image),
            *([] if self.vllm_image is None else _image("vllm-image", self.vllm_image)),
            *_registry(self.registry_uri),
            *_matching("namespace", self.namespace, _LABEL, 63),
            *([] if self.name is None else _matching("name", self.name, _LABEL, _NAME_LIMIT)),
        ]
        for option, secret in (("registry-secret", self.registry_secret), ("api-key-secret", self.api_key_secret)):
            problems += [] if secret is None else _matching(option, secret, _SUBDOMAIN, 253)
        for option, value, minimum in (("replicas", self.replicas, 1), ("gpus", self.gpus, 0), ("cpus", self.cpus, 1)):
            if not minimum <= value <= 10_000:
                problems.append(f"--{option} {value}: must be from {minimum} to 10000")
        if self.memory is not None and not _MEMORY.fullmatch(self.memory):
            problems.append(f"--memory {self.memory!r}: must be a whole number of Mi or Gi, like 24Gi")
        problems += [problem for option in self.options for problem in _option(option)]
        try:
            split_names(self.options, "")
        except InputError as error:
            problems.append(f"--option {error}")
        if problems:
            raise InputError("; ".join(problems))

    def name_for(self, release: ServedRelease) -> str:
        """The name of the objects. Raises InputError if none is given and the model's name is not valid."""
        name = self.name or release.name
        if _matching("name", name, _LABEL, _NAME_LIMIT):
            near = re.sub(r"[^a-z0-9]+", "-", release.name.lower()).strip("-")[:_NAME_LIMIT].strip("-")
            hint = f", for example --name {near}" if _LABEL.fullmatch(near) else ""
            raise InputError(
                f"{release.name!r}: not a valid name for Kubernetes objects (lower-case letters, digits and '-', at "
                f"most {_NAME_LIMIT}, starting with a letter); give a valid one{hint}"
            )
        return name

    def require_fit(self, release: ServedRelease) -> None:
        """Raises InputError if vLLM could not run the release in this way."""
        if self.gpus == 0 and not release.cpu:
            raise InputError(f"--gpus 0: vLLM's CPU kernels do not support the head size of {release.reference}")
        if self.gpus > 1 and self.gpus not in release.tensor_parallel:
            sizes = ", ".join(map(str, release.tensor_parallel))
            raise InputError(f"--gpus {self.gpus}: {release.reference} can only be split over {sizes}")
        if self.vllm_image is None and (release.plugin or self.gpus == 0):
            lacks = "the plug-in numprune-vllm" if release.plugin else "vLLM's build for CPUs"
            raise InputError(
                f"{release.reference}: needs {lacks}, which {VLLM_IMAGE} lacks; give an image that has it with "
                "--vllm-image"
            )


def _matching(field: str, value: str, pattern: re.Pattern[str], limit: int) -> list[str]:
    if pattern.fullmatch(value) and len(value) <= limit:
        return []
    return [f"--{field} {value!r}: must be lower-case letters, digits and '-', starting with a letter, at most {limit}"]


def _image(field: str, value: str) -> list[str]:
    found = _IMAGE.fullmatch(value) if len(value) <= 512 else None
    if found is None:
        return [f"--{field} {value!r}: not a valid image name"]
    if found["digest"] is None and found["tag"] in (None, "latest"):
        return [f"--{field} {value!r}: not pinned; give a tag other than latest, or a digest (…@sha256:…)"]
    return []


def _registry(value: str) -> list[str]:
    try:
        parts = urlsplit(value)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole or len(value) > 2048 or not re.fullmatch(r"[!-~]+", value):
        return [f"--uri {value!r}: must be the http(s) address of an MLflow server that the cluster can reach"]
    if "@" in parts.netloc:
        return ["--uri: contains credentials; put them into a Secret and name it with --registry-secret"]
    if parts.query or parts.fragment:
        return [f"--uri {value!r}: an MLflow server's address cannot contain '?' or '#'"]
    return []


def _option(option: str) -> list[str]:
    if not option.isprintable() or len(option) > 4096:
        return [f"--option {option!r}: not a valid command-line word"]
    reserved = taken(option, _RESERVED)
    if reserved == "--api-key":
        return ["--option: a manifest must not contain --api-key; name a Secret with --api-key-secret"]
    return [f"--option {option!r}: {reserved} is set by the manifest and cannot be given here"] if reserved else []
