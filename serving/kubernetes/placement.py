"""Where and how a release is to run: user input, checked before it enters a manifest."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from numprune.errors import InputError
from numprune.serving.kubernetes.release import ServedRelease
from numprune.serving.kubernetes.values import Values
from numprune.serving.vllm.environment import TESTED
from numprune.serving.vllm.options import split_names, taken

VLLM_IMAGE = f"vllm/vllm-openai:v{TESTED[-1]}"

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, as Services want it; RFC 1123 lets a digit begin, too
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")  # RFC 1123
_MEMORY = re.compile(r"[1-9][0-9]{0,6}(Mi|Gi)")
_IMAGE = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_NAME_LIMIT = 53  # KServe makes NAME-predictor of it, which is a label, too
# What the manifest sets itself; what would run code that came with a model, or write a secret into a manifest.
_RESERVED = (
    *("--model", "--host", "--port", "--uds", "--dtype", "--tensor-parallel-size"),
    *("--trust-remote-code", "--api-key", "--config"),
)


@dataclass(frozen=True)
class Placement:
    """Raises InputError naming every field that cannot be.

    Attributes:
        image: numprune's own, which fetches and verifies the release, and compares the server with it.
        registry_uri: the MLflow server, as the cluster reaches it.
        namespace: of the cluster.
        name: of the Deployment and Service; without one the model's, when it can be one.
        vllm_image: without one, vLLM's own of the version that numprune was tested with.
        gpus: in each replica, over which the model is split; 0 runs on CPUs, with an image that has vLLM for CPUs.
        cpus, memory: of vLLM's container in each replica; without one, memory by the size of the weights.
        registry_secret: a Secret whose keys are environment variables of MLflow's client (MLFLOW_TRACKING_TOKEN, …).
        api_key_secret: a Secret with the key VLLM_API_KEY: the API key that clients must send.
        options: further ones of vLLM; without --served-model-name, the model has its name in the registry.
        values: what the cluster asks of the pod.
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
            problems.append(f"--memory {self.memory!r}: must be a whole number of Mi or Gi, as in 24Gi")
        problems += [problem for option in self.options for problem in _option(option)]
        try:
            split_names(self.options, "")
        except InputError as error:
            problems.append(f"--option {error}")
        if problems:
            raise InputError("; ".join(problems))

    def name_for(self, release: ServedRelease) -> str:
        """The name of the objects. Raises InputError when none is given and the model's cannot be one."""
        name = self.name or release.name
        if _matching("name", name, _LABEL, _NAME_LIMIT):
            near = re.sub(r"[^a-z0-9]+", "-", release.name.lower()).strip("-")[:_NAME_LIMIT].strip("-")
            hint = f", for example --name {near}" if _LABEL.fullmatch(near) else ""
            raise InputError(
                f"{release.name!r}: not a valid name for Kubernetes objects (lower-case letters, digits and '-', at "
                f"most {_NAME_LIMIT}, a letter first); give one{hint}"
            )
        return name

    def require_fit(self, release: ServedRelease) -> None:
        """Raises InputError when vLLM could not run the release like this."""
        if self.gpus == 0 and not release.cpu:
            raise InputError(f"--gpus 0: vLLM's CPU kernels do not know the head size of {release.reference}")
        if self.gpus > 1 and self.gpus not in release.tensor_parallel:
            sizes = ", ".join(map(str, release.tensor_parallel))
            raise InputError(f"--gpus {self.gpus}: {release.reference} can only be split over {sizes}")
        if self.vllm_image is None and (release.plugin or self.gpus == 0):
            lacks = "the plug-in numprune-vllm" if release.plugin else "vLLM's build for CPUs"
            raise InputError(
                f"{release.reference}: needs {lacks}, which {VLLM_IMAGE} lacks; name an image that has it with "
                "--vllm-image"
            )


def _matching(field: str, value: str, pattern: re.Pattern[str], limit: int) -> list[str]:
    if pattern.fullmatch(value) and len(value) <= limit:
        return []
    return [f"--{field} {value!r}: must be lower-case letters, digits and '-', a letter first, at most {limit}"]


def _image(field: str, value: str) -> list[str]:
    found = _IMAGE.fullmatch(value) if len(value) <= 512 else None
    if found is None:
        return [f"--{field} {value!r}: not the name of an image"]
    if found["digest"] is None and found["tag"] in (None, "latest"):
        return [f"--{field} {value!r}: moves; name a tag other than latest, or a digest (…@sha256:…)"]
    return []


def _registry(value: str) -> list[str]:
    try:
        parts = urlsplit(value)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole or len(value) > 2048 or not re.fullmatch(r"[!-~]+", value):
        return [f"--uri {value!r}: must be the http(s) address of an MLflow server that the cluster reaches"]
    if "@" in parts.netloc:
        return ["--uri: holds credentials; put them into a Secret and name it with --registry-secret"]
    if parts.query or parts.fragment:
        return [f"--uri {value!r}: an MLflow server's address has neither '?' nor '#'"]
    return []


def _option(option: str) -> list[str]:
    if not option.isprintable() or len(option) > 4096:
        return [f"--option {option!r}: not a word of a command line"]
    reserved = taken(option, _RESERVED)
    if reserved == "--api-key":
        return ["--option: --api-key is not for a manifest; name a Secret with --api-key-secret"]
    return [f"--option {option!r}: {reserved} is not for you to set here"] if reserved else []
