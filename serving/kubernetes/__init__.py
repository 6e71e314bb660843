"""Manifests for Kubernetes and KServe, rendered from a published release.

    release = read_release(registry, "my-model@production")
    text = to_yaml(deployment(release, Placement(image="…:1.0", registry_uri="https://mlflow…")))

`release` describes what is served, `placement` where and how, `values` the cluster's requirements for the pod, `pod`
what both kinds of manifest share, and `manifests` the documents. A manifest names the version by number and digest,
never by alias: applying it again gives the same model, and `kubectl rollout undo` the previous one.
"""

from numprune.serving.kubernetes.manifests import deployment, inference_service, to_yaml
from numprune.serving.kubernetes.placement import Placement
from numprune.serving.kubernetes.release import ServedRelease, read_release
from numprune.serving.kubernetes.values import Values, read_values

__all__ = [
    "Placement",
    "ServedRelease",
    "Values",
    "deployment",
    "inference_service",
    "read_release",
    "read_values",
    "to_yaml",
]
