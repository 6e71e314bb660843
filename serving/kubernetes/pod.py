"""The pod: an init container fetches and verifies the release, vLLM serves it, and a canary compares the live server.

A pod is ready when all of its containers are, so one whose server does not compute what was released takes no traffic.
"""

from typing import Any

from numprune.serving.kubernetes.release import ServedRelease
from numprune.serving.kubernetes.target import VLLM_IMAGE, Target

Json = dict[str, Any]

PORT = 8080  # KServe's own default
_RELEASE = "/release"  # a volume; the release is the folder `content` in it, which appears there whole or not at all
_CONTENT = f"{_RELEASE}/content"
_TMP = "/tmp"  # noqa: S108 - in a container of its own
_PASSED = f"{_TMP}/canary-passed"
_USER = 1000
_GIB = 1 << 30
_MIB = 1 << 20
_CPU_KV_GIB = 4
_STARTUP_PROBES, _STARTUP_PERIOD_S = 180, 10  # half an hour: loading and compiling a large model
STARTUP_S = _STARTUP_PROBES * _STARTUP_PERIOD_S
_DRAIN_S = 15  # until the endpoints have forgotten a pod that ends
_GRACE_S = 120

_CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_spec(release: ServedRelease, target: Target, container: str) -> Json:
    """The spec of a pod whose main container is called `container`."""
    return {
        "automountServiceAccountToken": False,
        # With them, a Service called `vllm` sets VLLM_PORT, which vLLM takes for its own.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [_fetch(release, target)],
        "containers": [_vllm(release, target, container), _canary(release, target)],
        "volumes": [
            {"name": "release", "emptyDir": {"sizeLimit": _mebibytes(release.size_bytes * 1.05 + 64 * _MIB)}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},  # numprune's
            {"name": "vllm", "emptyDir": {"sizeLimit": "16Gi"}},  # what it compiles
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def _fetch(release: ServedRelease, target: Target) -> Json:
    """`registry fetch` resolves the version, compares its digest with the one asked for, verifies every file, and
    compares every tensor with the configuration.
    """
    secret = target.registry_secret
    return {
        "name": "fetch",
        "image": target.image,
        "args": _literal(
            *("registry", "fetch", release.reference, _CONTENT, "--digest", release.digest),
            *("--uri", target.registry_uri, "--workspace", f"{_TMP}/numprune"),
        ),
        "env": [{"name": "HOME", "value": _TMP}],
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": _mebibytes(release.size_bytes * 1.05)},
            "limits": {"memory": "2Gi"},
        },
        "securityContext": _CONFINED,
        "volumeMounts": [{"name": "release", "mountPath": _RELEASE}, {"name": "tmp", "mountPath": _TMP}],
    }


def _canary(release: ServedRelease, target: Target) -> Json:
    """It stays, idle, once the server has passed; else it ends, and is started again, ever more seldom."""
    return {
        "name": "canary",
        "image": target.image,
        "args": _literal(
            *("canary", _CONTENT, "--url", f"http://127.0.0.1:{PORT}", "--dtype", release.dtype),
            *("--startup-timeout", str(STARTUP_S), "--marker", _PASSED),
        ),
        "env": [{"name": "HOME", "value": _TMP}],
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "readinessProbe": {"exec": {"command": ["test", "-f", _PASSED]}, "periodSeconds": 5},
        "securityContext": _CONFINED,
        "volumeMounts": [
            {"name": "release", "mountPath": _RELEASE, "readOnly": True},
            {"name": "tmp", "mountPath": _TMP},
        ],
    }


def _vllm(release: ServedRelease, target: Target, container: str) -> Json:
    split = ("--tensor-parallel-size", str(target.gpus)) if target.gpus > 1 else ()
    environment = {
        "HOME": _TMP,
        "USER": "vllm",  # the image's /etc/passwd has no name for our user, and torch asks for one
        "VLLM_CACHE_ROOT": f"{_TMP}/vllm",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if release.plugin:
        environment["VLLM_PLUGINS"] = "numprune"  # ours and no other of the image
    if target.gpus == 0:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_CPU_KV_GIB)
    memory = target.memory or _memory(release, target)
    return {
        "name": container,
        "image": target.vllm_image or VLLM_IMAGE,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": _literal(
            *("--model", f"{_CONTENT}/checkpoint", "--served-model-name", release.name),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104 - inside the pod
            *("--dtype", release.dtype),  # vLLM's own choice would halve float32
            *split,
            *release.options,
            *target.options,
        ),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {"cpu": str(target.cpus), "memory": memory},
            "limits": {"memory": memory, **({"nvidia.com/gpu": target.gpus} if target.gpus else {})},
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


def _probe(*, period_s: int, failures: int) -> Json:
    return {
        "httpGet": {"path": "/health", "port": PORT},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _memory(release: ServedRelease, target: Target) -> str:
    """Libraries and CUDA contexts take some GiB whatever the model; the weights pass through, or stay, once."""
    kv_gib = _CPU_KV_GIB if target.gpus == 0 else 0
    gib = 8 + 2 * max(1, target.gpus) + kv_gib + -(-release.weight_bytes // _GIB)
    return f"{gib}Gi"


def _mebibytes(size: float) -> str:
    return f"{-(-int(size) // _MIB)}Mi"


def _literal(*words: str) -> list[str]:
    """Words that Kubernetes passes on as they are: it would put variables in the place of `$(NAME)`."""
    return [word.replace("$(", "$$(") for word in words]
