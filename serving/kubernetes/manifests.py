"""The manifests, and their YAML."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from numprune.serving.kubernetes.placement import Placement
from numprune.serving.kubernetes.pod import PORT, STARTUP_S, pod_spec
from numprune.serving.kubernetes.release import ServedRelease

Json = dict[str, Any]

_COMPONENT = "inference-server"
# Some YAML versions and implementations read these as numbers, others as text.
_NUMBER_LIKE = re.compile(r"[-+.0-9]")


def deployment(release: ServedRelease, placement: Placement) -> list[Json]:
    """A Deployment that keeps all its replicas ready during an update, and its Service on port 80.

    Raises InputError if the release cannot run in this way.
    """
    placement.require_fit(release)
    name = placement.name_for(release)
    selector = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": _COMPONENT}
    metadata = {
        "name": name,
        "namespace": placement.namespace,
        "labels": _labels(name, release),
        "annotations": _annotations(release),
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": placement.replicas,
                "selector": {"matchLabels": selector},
                "strategy": _rolling(),
                "progressDeadlineSeconds": STARTUP_S + 1800,  # time to pull the images and fetch the release
                "template": {
                    "metadata": {"labels": _labels(name, release), "annotations": _annotations(release)},
                    "spec": pod_spec(release, placement, "vllm"),
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": "ClusterIP",
                "selector": selector,
                "ports": [{"name": "http", "port": 80, "targetPort": PORT, "protocol": "TCP"}],
            },
        },
    ]


def inference_service(release: ServedRelease, placement: Placement) -> list[Json]:
    """A KServe InferenceService in raw deployment mode: Knative by default allows no init containers.

    Raises InputError if the release cannot run in this way.
    """
    placement.require_fit(release)
    name = placement.name_for(release)
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": name,
                "namespace": placement.namespace,
                "labels": _labels(name, release),
                # Since 0.16 KServe calls this mode Standard but still accepts this name.
                "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment", **_annotations(release)},
            },
            "spec": {
                "predictor": {
                    "minReplicas": placement.replicas,
                    "maxReplicas": placement.replicas,
                    "deploymentStrategy": _rolling(),
                    "labels": _labels(name, release),
                    "annotations": _annotations(release),
                    **pod_spec(release, placement, "kserve-container"),
                }
            },
        }
    ]


def to_yaml(documents: Sequence[Json]) -> str:
    """The documents as one file."""
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120
    )


def _rolling() -> Json:
    """Start a new pod, and remove an old one only once the new one is ready."""
    return {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def _labels(name: str, release: ServedRelease) -> dict[str, str]:
    """Labels are limited to 63 characters, so the full digest is an annotation."""
    return {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/component": _COMPONENT,
        "app.kubernetes.io/managed-by": "numprune",
        "app.kubernetes.io/version": str(release.version),
        "numprune/digest": release.digest[:16],
    }


def _annotations(release: ServedRelease) -> dict[str, str]:
    return {
        "numprune/release": release.reference,
        "numprune/digest": release.digest,
        "numprune/run": release.run,
    }


class _Dumper(yaml.SafeDumper):
    """No anchors; text that a parser might read as a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _NUMBER_LIKE.match(value) else None)


_Dumper.add_representer(str, _text)
