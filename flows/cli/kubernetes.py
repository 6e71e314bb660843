"""numprune kubernetes: manifests for a cluster."""

import argparse
from pathlib import Path

from numprune.flows.cli.parser import MODEL_REFERENCE, Answer, Subcommands, command


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "kubernetes",
        kubernetes,
        "write manifests that serve a version in a cluster, pinned by number and digest",
        "numprune kubernetes my-model@production --format deployment --image registry.example/numprune:0.3.0 "
        "--uri https://mlflow.example --out my-model.yaml",
    )
    parser.add_argument("reference", metavar="REFERENCE", help=MODEL_REFERENCE)
    parser.add_argument(
        "--format",
        required=True,
        choices=("deployment", "kserve"),
        metavar="FORMAT",
        help="kind of manifest: deployment, kserve",
    )
    parser.add_argument(
        "--image", required=True, metavar="IMAGE", help="numprune's image, which fetches and verifies the release"
    )
    parser.add_argument("--uri", required=True, metavar="URI", help="the MLflow server that the cluster fetches from")
    parser.renamed = {"--registry-uri": "--uri"}
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--workspace", metavar="DIR", help="look up the version in this workspace's registry (default: in --uri)"
    )
    parser.add_argument("--namespace", default="default", help="namespace of the cluster (default: %(default)s)")
    parser.add_argument(
        "--name", help="name of the Deployment and Service, or of the InferenceService (default: the model's)"
    )
    parser.add_argument(
        "--vllm-image",
        metavar="IMAGE",
        help="image with vLLM; required if the release needs the plug-in (default: vLLM's own)",
    )
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="replicas of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of each replica; 0: CPU only (default: %(default)s)",
    )
    parser.add_argument("--cpus", type=int, default=4, metavar="N", help="CPUs of each replica (default: %(default)s)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory of each replica, like 24Gi (default: by the size of the weights)"
    )
    parser.add_argument(
        "--registry-secret",
        metavar="SECRET",
        help="Secret with MLflow's environment variables, like MLFLOW_TRACKING_TOKEN (default: none)",
    )
    parser.add_argument(
        "--api-key-secret",
        metavar="SECRET",
        help="Secret with the key VLLM_API_KEY, the API key that clients must send (default: none)",
    )
    parser.add_argument(
        "--values",
        type=Path,
        metavar="FILE",
        help="YAML: nodeSelector, tolerations, imagePullSecrets, securityContext, env, fetchEnv, releaseClaim "
        "(default: none)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="WORD",
        help="option for vLLM; may be repeated: --option=--max-model-len=4096 (default: none)",
    )


def kubernetes(args: argparse.Namespace) -> Answer:
    from numprune.export.disk import require_writable
    from numprune.flows.stages import workspace_folder
    from numprune.serving import kubernetes as manifests
    from numprune.serving.registry import open_registry

    require_writable(args.out.parent)
    placement = manifests.Placement(
        image=args.image,
        registry_uri=args.uri,
        namespace=args.namespace,
        name=args.name,
        vllm_image=args.vllm_image,
        replicas=args.replicas,
        gpus=args.gpus,
        cpus=args.cpus,
        memory=args.memory,
        registry_secret=args.registry_secret,
        api_key_secret=args.api_key_secret,
        options=tuple(args.option),
        values=manifests.read_values(args.values) if args.values else manifests.Values(),
    )
    uri = None if args.workspace else args.uri
    release = manifests.read_release(open_registry(uri, workspace_folder(args.workspace)), args.reference)
    render = {"deployment": manifests.deployment, "kserve": manifests.inference_service}[args.format]
    documents = render(release, placement)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(manifests.to_yaml(documents), encoding="utf-8")
    kinds = " and ".join(document["kind"] for document in documents)
    text = f"{args.out}: {kinds} for {release.reference}, digest {release.digest}"
    if placement.vllm_image is None and placement.values.security_context.run_as_user is None:
        text += (
            "\nvLLM's image runs as root, which the pod does not allow. OpenShift assigns a user; elsewhere set "
            "securityContext.runAsUser with --values."
        )
    return Answer(
        {"out": str(args.out), "reference": release.reference, "digest": release.digest, "documents": documents}, text
    )
