"""The pod: an init container fetches and verifies the release, vLLM serves it, and a container checks its answers.

A pod is ready when all of its containers are, so a pod whose server does not compute what was released takes no
traffic.
"""

from typing import Any

from numprune.serving.kubernetes.placement import VLLM_IMAGE, Placement
from numprune.serving.kubernetes.release import ServedRelease
from numprune.serving.kubernetes.values import merged
from numprune.serving.vllm import api_key
from numprune.serving.vllm.options import split_names

Json = dict[str, Any]

PORT = 8080  # KServe's own default
_RELEASE = "/release"  # a volume; the release is a folder in it, which appears atomically
_TMP = "/tmp"  # noqa: S108 - in a container of its own
_PASSED = f"{_TMP}/server-checked"
_GIB = 1 << 30
_MIB = 1 << 20
_CPU_KV_GIB = 4
_STARTUP_PROBES, _STARTUP_PERIOD_S = 180, 10  # half an hour, for loading and compiling a large model
STARTUP_S = _STARTUP_PROBES * _STARTUP_PERIOD_S
_DRAIN_S = 15  # until a terminating pod has left the endpoints
_GRACE_S = 120

_CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_spec(release: ServedRelease, placement: Placement, container: str) -> Json:
    """The pod spec; the main container is named `container`."""
    claim = placement.values.release_claim
    return {
        "automountServiceAccountToken": False,
        # Otherwise a Service named `vllm` sets VLLM_PORT, which vLLM takes for its own setting.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        # No user is set: OpenShift assigns one per namespace and rejects any other.
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            **placement.values.security_context.to_json(),
        },
        **placement.values.pod_fields(),
        "initContainers": [_fetch(release, placement)],
        "containers": [_vllm(release, placement, container), _check_server(release, placement)],
        "volumes": [
            {"name": "release", "persistentVolumeClaim": {"claimName": claim}}
            if claim
            else {"name": "release", "emptyDir": {"sizeLimit": _mebibytes(release.size_bytes * 1.05 + 64 * _MIB)}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},  # numprune's
            {"name": "vllm", "emptyDir": {"sizeLimit": "16Gi"}},  # compiled code
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def _fetch(release: ServedRelease, placement: Placement) -> Json:
    """`registry fetch` resolves the version, compares its digest with the one asked for, verifies every file, and
    compares every tensor with the configuration.
    """
    secret = placement.registry_secret
    copy = {} if placement.values.release_claim else {"ephemeral-storage": _mebibytes(release.size_bytes * 1.05)}
    return {
        "name": "fetch",
        "image": placement.image,
        "args": _literal(
            *("registry", "fetch", release.reference, _content(release), "--digest", release.digest),
            *("--uri", placement.registry_uri, "--workspace", f"{_TMP}/numprune"),
        ),
        "env": merged({"HOME": _TMP}, placement.values.fetch_env),
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi", **copy},
            "limits": {"memory": "2Gi"},
        },
        "securityContext": _CONFINED,
        "volumeMounts": [{"name": "release", "mountPath": _RELEASE}, {"name": "tmp", "mountPath": _TMP}],
    }


def _check_server(release: ServedRelease, placement: Placement) -> Json:
    """It idles once the server has passed; otherwise it exits and is restarted with back-off."""
    return {
        "name": "check-server",
        "image": placement.image,
        "args": _literal(
            *("check-server", _content(release), "--url", f"http://127.0.0.1:{PORT}", "--dtype", release.dtype),
            *("--startup-timeout", str(STARTUP_S), "--marker", _PASSED),
        ),
        "env": [{"name": "HOME", "value": _TMP}, *_api_key(placement)],
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "readinessProbe": {"exec": {"command": ["test", "-f", _PASSED]}, "periodSeconds": 5},
        "securityContext": _CONFINED,
        "volumeMounts": [
            {"name": "release", "mountPath": _RELEASE, "readOnly": True},
            {"name": "tmp", "mountPath": _TMP},
        ],
    }


def _vllm(release: ServedRelease, placement: Placement, container: str) -> Json:
    split = ("--tensor-parallel-size", str(placement.gpus)) if placement.gpus > 1 else ()
    environment = {
        "HOME": _TMP,
        "USER": "vllm",  # torch needs a user name, and the image's /etc/passwd has none for this user
        "VLLM_CACHE_ROOT": f"{_TMP}/vllm",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if release.plugin:
        environment["VLLM_PLUGINS"] = "numprune"  # numprune's, regardless of others in the image
    if placement.gpus == 0:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_CPU_KV_GIB)
    memory = placement.memory or _memory(release, placement)
    names, options = split_names(placement.options, release.name)
    return {
        "name": container,
        "image": placement.vllm_image or VLLM_IMAGE,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": _literal(
            *("--model", f"{_content(release)}/checkpoint", "--served-model-name", *names),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 - inside the pod
            *("--dtype", release.dtype),  # by default vLLM would convert float32 to half precision
            *split,
            *release.options,
            *options,
        ),
        "env": [*merged(environment, placement.values.env), *_api_key(placement)],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {"cpu": str(placement.cpus), "memory": memory},
            "limits": {"memory": memory, **({"nvidia.com/gpu": placement.gpus} if placement.gpus else {})},
        },
        "startupProbe": _probe(period_s=_STARTUP_PERIOD_S, failures=_STARTUP_PROBES),
        "readinessProbe": _probe(period_s=5, failures=3),
        "livenessProbe": _probe(period_s=10, failures=6),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_DRAIN_S)]}}},
        "securityContext": _CONFINED,
        "volumeMounts": [
            {"name": "release", "mountPath": _RELEASE, "readOnly": True},
            {"name": "vllm", "mountPath": _TMP},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - through it vLLM's processes talk
        ],
    }


def _content(release: ServedRelease) -> str:
    """The folder of the release, named by digest because a claim can hold several releases."""
    return f"{_RELEASE}/{release.digest[:16]}"


def _api_key(placement: Placement) -> list[Json]:
    """The environment variable with the API key, by reference."""
    if placement.api_key_secret is None:
        return []
    reference = {"name": placement.api_key_secret, "key": api_key.VARIABLE}
    return [{"name": api_key.VARIABLE, "valueFrom": {"secretKeyRef": reference}}]


def _probe(*, period_s: int, failures: int) -> Json:
    return {
        "httpGet": {"path": "/health", "port": PORT},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _memory(release: ServedRelease, placement: Placement) -> str:
    """Libraries and CUDA contexts take a few GiB for any model; the weights pass through memory once, or stay."""
    kv_gib = _CPU_KV_GIB if placement.gpus == 0 else 0
    gib = 8 + 2 * max(1, placement.gpus) + kv_gib + -(-release.weight_bytes // _GIB)
    return f"{gib}Gi"


def _mebibytes(size: float) -> str:
    return f"{-(-int(size) // _MIB)}Mi"


def _literal(*words: str) -> list[str]:
    """Escape words so that Kubernetes passes them on unchanged: it would expand `$(NAME)`."""
    return [word.replace("$(", "$$(") for word in words]
