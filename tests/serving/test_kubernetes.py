"""Manifests against the schemas of Kubernetes and of KServe's SDK, from releases in MLflow's real store."""

import ast
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest, vllm
from numprune.serving import reference_answers
from numprune.serving import registry as registries
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.kubernetes import (
    Placement,
    ServedRelease,
    Values,
    deployment,
    inference_service,
    read_release,
    read_values,
    to_yaml,
)
from numprune.serving.report import Report, markdown, write

Json = dict[str, Any]

OLDEST, NEWEST = "1.28", "1.37"  # releases of Kubernetes
RELEASE = ServedRelease(
    name="my-model",
    version=3,
    digest="ab" * 32,
    run="my-model-20261121T000000Z",
    size_bytes=3 << 30,
    weight_bytes=2 << 30,
    dtype="bfloat16",
    options=(),
    plugin=False,
    tensor_parallel=(1, 2),
    cpu=True,
)
PLACEMENT = Placement(image="registry.example:5000/team/numprune:0.1.0", registry_uri="https://mlflow.example/team")
CONTENT = f"/release/{RELEASE.digest[:16]}"
CPU_IMAGE = "registry.example/vllm-cpu:0.32.0"


def changed(**fields: Any) -> Placement:
    return dataclasses.replace(PLACEMENT, **fields)


VALUES: Json = {
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "tolerations": [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "dedicated", "value": "llm", "effect": "NoExecute", "tolerationSeconds": 60},
        {"operator": "Exists"},
    ],
    "imagePullSecrets": [{"name": "registry.example"}],
    "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "supplementalGroups": [2000]},
    "env": [
        {"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"},
        {"name": "HF_HUB_OFFLINE", "value": "0"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ],
    "fetchEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
    "releaseClaim": "releases",
}
VARIANTS = {
    "one GPU": (RELEASE, PLACEMENT),
    "two GPUs": (RELEASE, changed(gpus=2, replicas=3, memory="40Gi", registry_secret="mlflow.token")),
    "CPUs": (RELEASE, changed(gpus=0, vllm_image=CPU_IMAGE, namespace="llm-serving", name="other")),
    "plug-in": (
        dataclasses.replace(RELEASE, plugin=True, options=("--model-impl", "vllm")),
        changed(vllm_image=f"registry.example/vllm@sha256:{'0' * 64}", options=("--max-model-len=4096",)),
    ),
    "values": (RELEASE, changed(values=Values.model_validate(VALUES), api_key_secret="keys")),
}


# --- schemas ---------------------------------------------------------------------------------------


def parsed(documents: list[Json]) -> list[Json]:
    """What a cluster reads."""
    read = list(yaml.safe_load_all(to_yaml(documents)))
    assert read == documents
    return read


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deployment_and_its_service_are_valid(variant: str, kubernetes: str) -> None:
    workload, service = parsed(deployment(*VARIANTS[variant]))
    for document in (workload, service):
        kubernetes_validate.validate(document, kubernetes, strict=True)
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert workload["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert not {"app.kubernetes.io/version", "numprune/digest"} & set(service["spec"]["selector"])


def test_the_schema_is_strict() -> None:
    workload, _ = deployment(RELEASE, PLACEMENT)
    workload["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(workload, NEWEST, strict=True)


KSERVE = Path(sys.prefix) / "share" / "kserve" / "kserve" / "models"  # where `make env` puts KServe's SDK


def kserve_fields(model: str) -> dict[str, str]:
    """The fields of one of the SDK's models and their types, by the names of the manifest.

    Read, not imported: the SDK's package pins much of what it imports, none of it needed for this.
    """
    tree = ast.parse((KSERVE / f"{model}.py").read_text(encoding="utf-8"))
    found = {
        target.id: ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
    }
    return {found["attribute_map"][name]: kind for name, kind in found["openapi_types"].items()}


@pytest.mark.skipif(not KSERVE.is_dir(), reason="needs KServe's SDK, which make env installs")
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_inference_service_is_valid(variant: str) -> None:
    """KServe's own fields by its SDK; the pod's, which it embeds, by Kubernetes' schema."""
    (document,) = parsed(inference_service(*VARIANTS[variant]))
    check_inference_service(document)


@pytest.mark.skipif(not KSERVE.is_dir(), reason="needs KServe's SDK, which make env installs")
def test_the_example_for_onnx_is_valid() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "onnx-kserve.yaml"
    document = yaml.safe_load(example.read_text(encoding="utf-8"))
    check_inference_service(document)
    pod = document["spec"]["predictor"]
    mounts = [one for container in pod["containers"] for one in container["volumeMounts"]]
    assert {one["name"] for one in mounts} == {one["name"] for one in pod["volumes"]}


@pytest.mark.skipif(not KSERVE.is_dir(), reason="needs KServe's SDK, which make env installs")
def test_unknown_kserve_fields_are_detected() -> None:
    (document,) = inference_service(RELEASE, PLACEMENT)
    document["spec"]["predictor"]["minReplica"] = 1
    with pytest.raises(AssertionError, match="minReplica"):
        check_inference_service(document)


def check_inference_service(document: Json) -> None:
    kserve_fields_of = {
        "V1beta1InferenceService": "v1beta1_inference_service",
        "V1beta1InferenceServiceSpec": "v1beta1_inference_service_spec",
        "V1beta1PredictorSpec": "v1beta1_predictor_spec",
    }
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    nodes = {
        "V1beta1InferenceService": document,
        "V1beta1InferenceServiceSpec": document["spec"],
        "V1beta1PredictorSpec": document["spec"]["predictor"],
    }
    for model, node in nodes.items():
        fields = kserve_fields(kserve_fields_of[model])
        assert set(node) <= set(fields), sorted(set(node) - set(fields))
        for name, value in node.items():
            kind = fields[name]
            assert isinstance(value, {"int": int, "str": str, "bool": bool, "dict(str, str)": dict}.get(kind, object))
    predictor = document["spec"]["predictor"]
    pod_fields = {"containers", "initContainers", "volumes", "securityContext", "automountServiceAccountToken"}
    pod_fields |= {"enableServiceLinks", "terminationGracePeriodSeconds"}
    pod_fields |= {"nodeSelector", "tolerations", "imagePullSecrets"}
    spec = {name: value for name, value in predictor.items() if name in pod_fields}
    own = set(predictor) - pod_fields
    assert own == {"minReplicas", "maxReplicas", "deploymentStrategy", "labels", "annotations"}
    kubernetes_validate.validate(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": document["metadata"],
            "spec": {
                "selector": {"matchLabels": predictor["labels"]},
                "strategy": predictor["deploymentStrategy"],
                "template": {"metadata": {"labels": predictor["labels"]}, "spec": spec},
            },
        },
        NEWEST,
        strict=True,
    )
    assert predictor["containers"][0]["name"] == "kserve-container"


# --- what they say ---------------------------------------------------------------------------------


def pod(documents: list[Json]) -> Json:
    spec: Json = documents[0]["spec"]["template"]["spec"]
    return spec


def test_the_release_is_pinned_fetched_and_verified_before_vllm_starts() -> None:
    workload, _ = deployment(RELEASE, PLACEMENT)
    spec = workload["spec"]["template"]["spec"]
    (fetch,), (server, _) = spec["initContainers"], spec["containers"]
    assert fetch["args"] == [
        *("registry", "fetch", "my-model/3", CONTENT, "--digest", RELEASE.digest),
        *("--uri", "https://mlflow.example/team", "--workspace", "/tmp/numprune"),
    ]
    assert server["args"][:4] == ["--model", f"{CONTENT}/checkpoint", "--served-model-name", "my-model"]
    assert server["args"][-2:] == ["--dtype", "bfloat16"]
    assert {"name": "release", "mountPath": "/release", "readOnly": True} in server["volumeMounts"]
    assert spec["volumes"][0]["emptyDir"]["sizeLimit"] == "3290Mi"
    for metadata in (workload["metadata"], workload["spec"]["template"]["metadata"]):
        assert metadata["annotations"]["numprune/release"] == "my-model/3"
        assert metadata["annotations"]["numprune/digest"] == RELEASE.digest
        assert metadata["labels"]["app.kubernetes.io/version"] == "3"
    assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_containers_do_not_run_as_root_or_write_to_their_image() -> None:
    spec = pod(deployment(RELEASE, PLACEMENT))
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert not spec["automountServiceAccountToken"]
    for container in (*spec["initContainers"], *spec["containers"]):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_vllm_health_is_probed() -> None:
    server, _ = pod(deployment(RELEASE, PLACEMENT))["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": 8080}
    assert server["ports"][0]["containerPort"] == 8080
    assert server["args"][server["args"].index("--port") + 1] == "8080"


def test_a_pod_is_ready_once_its_server_passed_the_check() -> None:
    server, check = pod(deployment(RELEASE, PLACEMENT))["containers"]
    assert check["image"] == PLACEMENT.image
    assert check["args"][:4] == ["check-server", CONTENT, "--url", "http://127.0.0.1:8080"]
    assert check["args"][check["args"].index("--dtype") + 1] == server["args"][-1] == "bfloat16"
    marker = check["args"][check["args"].index("--marker") + 1]
    assert check["readinessProbe"]["exec"]["command"] == ["test", "-f", marker]
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert "tmp" not in mounts  # where the marker is


def test_gpus_and_release_requirements() -> None:
    release, placement = VARIANTS["two GPUs"]
    server, _ = pod(deployment(release, placement))["containers"]
    assert server["resources"]["limits"] == {"memory": "40Gi", "nvidia.com/gpu": 2}
    assert server["args"][-2:] == ["--tensor-parallel-size", "2"]
    (fetch,) = pod(deployment(release, placement))["initContainers"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "mlflow.token"}}]

    release, placement = VARIANTS["plug-in"]
    server, _ = pod(deployment(release, placement))["containers"]
    assert server["args"][-3:] == ["--model-impl", "vllm", "--max-model-len=4096"]
    assert {"name": "VLLM_PLUGINS", "value": "numprune"} in server["env"]
    assert server["image"] == placement.vllm_image

    release, placement = VARIANTS["CPUs"]
    server, _ = pod(deployment(release, placement))["containers"]
    assert "nvidia.com/gpu" not in server["resources"]["limits"]
    assert not any(variable["name"] == "VLLM_PLUGINS" for variable in server["env"])


def test_values_appear_in_the_pod() -> None:
    spec = pod(deployment(*VARIANTS["values"]))
    for field in ("nodeSelector", "tolerations", "imagePullSecrets"):
        assert spec[field] == VALUES[field]
    assert spec["securityContext"].items() >= VALUES["securityContext"].items()
    assert spec["volumes"][0] == {"name": "release", "persistentVolumeClaim": {"claimName": "releases"}}
    (fetch,), (server, check) = spec["initContainers"], spec["containers"]
    assert "ephemeral-storage" not in fetch["resources"]["requests"]
    assert fetch["env"] == [{"name": "HOME", "value": "/tmp"}, *VALUES["fetchEnv"]]
    names = [variable["name"] for variable in server["env"]]
    assert len(names) == len(set(names))
    assert all(variable in server["env"] for variable in VALUES["env"])  # in the place of ours
    key = {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "VLLM_API_KEY"}}}
    for container in (server, check):
        assert key in container["env"]


def test_without_values_the_cluster_needs_nothing_special() -> None:
    spec = pod(deployment(RELEASE, PLACEMENT))
    assert not {"nodeSelector", "tolerations", "imagePullSecrets"} & set(spec)
    assert "VLLM_API_KEY" not in to_yaml(deployment(RELEASE, PLACEMENT))


def test_the_model_can_have_served_names() -> None:
    options = ("--seed=3", "--served-model-name", "chat", "chat-1.5")
    server, _ = pod(deployment(RELEASE, changed(options=options)))["containers"]
    assert server["args"][2:5] == ["--served-model-name", "chat", "chat-1.5"]
    assert server["args"][-1] == "--seed=3"


SECRET = "hunter2"
WRONG_VALUES = {
    "no mapping": ("[1]", "as a whole: Input should be a valid dictionary"),
    "no YAML": (f"env:\n- {{name: A, value: {SECRET}", "not YAML"),
    "unknown field": ("nodeselector: {}", "nodeselector: Extra inputs are not permitted"),
    "a number for text": ("nodeSelector: {a: 1}", r"nodeSelector\.a: Input should be a valid string \(given: 1\)"),
    "a label": ("nodeSelector: {a: 'b c'}", r"nodeSelector\.a: String should match"),
    "an effect": ("tolerations: [{key: a, effect: Never}]", r"tolerations\.0\.effect"),
    "a value that is not compared": ("tolerations: [{key: a, operator: Exists, value: b}]", "value must be omitted"),
    "no key": ("tolerations: [{value: b}]", "operator must be Exists"),
    "seconds": ("tolerations: [{key: a, tolerationSeconds: 3}]", "tolerationSeconds needs effect NoExecute"),
    "a pull secret": ("imagePullSecrets: [registry]", r"imagePullSecrets\.0"),
    "root": ("securityContext: {runAsUser: 0}", r"securityContext\.runAsUser: .*greater than or equal to 1"),
    "a secret": (f"env: [{{name: HF_TOKEN, value: {SECRET}}}]", r"env\.0: is a secret: .*secretKeyRef"),
    "the API key": (f"env: [{{name: VLLM_API_KEY, value: {SECRET}}}]", "--api-key-secret"),
    "both": (f"fetchEnv: [{{name: A, value: {SECRET}, valueFrom: {{}}}}]", r"fetchEnv\.0"),
    "neither": ("env: [{name: A}]", "either value or valueFrom"),
    "twice": (f"env: [{{name: A, value: {SECRET}}}, {{name: A, value: b}}]", "env: A: must be given only once"),
    "a misspelling": (f"env: [{{name: A, valeu: {SECRET}}}]", r"env\.0\.valeu"),
    "two origins": (
        "env: [{name: A, valueFrom: {fieldRef: {fieldPath: a}, secretKeyRef: {name: a, key: b}}}]",
        "must be one of secretKeyRef, configMapKeyRef and fieldRef",
    ),
    "a claim": ("releaseClaim: ../x", "releaseClaim"),
    "nested": ("[" * 3000, "not YAML"),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_wrong_values_are_refused_by_name_and_no_secret_is_repeated(tmp_path: Path, wrong: str) -> None:
    text, message = WRONG_VALUES[wrong]
    file = tmp_path / "values.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"--values .*values\.yaml.*: .*{message}") as refused:
        read_values(file)
    assert SECRET not in str(refused.value)


def test_values_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    assert read_values(file).to_json() == VALUES
    file.write_text("# nothing\n")
    assert read_values(file) == Values()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_values(tmp_path / "none.yaml")


def test_kubernetes_expands_no_variable_in_options() -> None:
    server, _ = pod(deployment(RELEASE, changed(options=("--chat-template=$(HOME)/x",))))["containers"]
    assert server["args"][-1] == "--chat-template=$$(HOME)/x"


def test_text_that_looks_like_a_number_stays_text() -> None:
    release = dataclasses.replace(RELEASE, digest="1e" + "3" * 62)
    text = to_yaml(deployment(release, PLACEMENT))
    assert f'numprune/digest: "{release.digest}"' in text
    assert 'app.kubernetes.io/version: "3"' in text
    assert "&id" not in text


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"namespace": "Default"}, "--namespace 'Default'"),
        ({"namespace": "a\nb"}, "--namespace"),
        ({"namespace": "a" * 64}, "at most 63"),
        ({"name": "x: y"}, "--name 'x: y'"),
        ({"name": "-x"}, "--name"),
        ({"name": "a" * 54}, "at most 53"),
        ({"registry_secret": "../x"}, "--registry-secret"),
        ({"api_key_secret": "a/b"}, "--api-key-secret"),
        ({"options": ("--served-model-name",)}, "--option --served-model-name: expected at least one"),
        ({"image": "numprune"}, "not pinned"),
        ({"image": "numprune:latest"}, "not pinned"),
        ({"image": "numprune:1.0\n  privileged: true"}, "not a valid image name"),
        ({"image": "numprune:1.0 --privileged"}, "not a valid image name"),
        ({"vllm_image": "vllm/vllm-openai"}, "--vllm-image"),
        ({"image": "numprune@sha256:12"}, "not a valid image name"),
        ({"registry_uri": "sqlite:///mlflow.db"}, "http"),
        ({"registry_uri": "https://"}, "--uri"),
        ({"registry_uri": "https://mlflow.example:port"}, "--uri"),
        ({"registry_uri": "https://user:secret@mlflow.example"}, "credentials"),
        ({"registry_uri": "https://mlflow.example/?token=secret"}, "cannot contain"),
        ({"registry_uri": "https://mlflow.example/ x"}, "--uri"),
        ({"replicas": 0}, "--replicas 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"cpus": 0}, "--cpus 0"),
        ({"memory": "24G"}, "--memory"),
        ({"options": ("--model=/other",)}, "--model"),
        ({"options": ("--trust_remote_code",)}, "--trust-remote-code"),
        ({"options": ("--trust",)}, "--trust-remote-code"),
        (
            {"options": ("--api-key", "secret")},
            "a manifest must not contain --api-key; name a Secret with --api-key-secret",
        ),
        ({"options": ("--port=1",)}, "--port"),
        ({"options": ("a\x00b",)}, "not a valid command-line word"),
    ],
)
def test_hostile_and_invalid_input_is_refused(fields: Json, said: str) -> None:
    with pytest.raises(InputError, match=said):
        changed(**fields)


def test_all_problems_are_reported_without_repeating_secrets() -> None:
    with pytest.raises(InputError) as refused:
        changed(namespace="A", replicas=0, registry_uri="https://me:hunter2@mlflow.example")
    assert all(part in str(refused.value) for part in ("--namespace", "--replicas", "--registry-secret"))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("release", "placement", "said"),
    [
        ({"name": "My_Model"}, {}, "--name my-model"),
        ({"name": "模型"}, {}, "give a valid one"),
        ({}, {"gpus": 4}, "split over 1, 2"),
        ({}, {"gpus": 0}, "build for CPUs"),
        ({"plugin": True}, {}, "numprune-vllm"),
        ({"cpu": False}, {"gpus": 0, "vllm_image": CPU_IMAGE}, "head size"),
    ],
)
def test_impossible_deployments_are_refused(release: Json, placement: Json, said: str) -> None:
    for render in (deployment, inference_service):
        with pytest.raises(InputError, match=said):
            render(dataclasses.replace(RELEASE, **release), changed(**placement))


# --- from the registry -----------------------------------------------------------------------------


@pytest.fixture
def publish(tmp_path: Path, report_json: Json) -> Callable[..., registries.Registry]:
    """`publish(checkpoint_folder)` publishes a release with it as `served`."""

    def make(checkpoint: Path, answers: str | None = reference_answers.FILE_NAME) -> registries.Registry:
        part = manifest.read(checkpoint)
        identity = {**report_json["identity"], "candidate": part.digest, "exports": {}}
        report = Report.model_validate({**report_json, "identity": identity})
        judged = report.judged(judge(report, Policy(gates=(Gate(metric="quality.tokens", bound="point", min=1),))))
        with manifest.creating(tmp_path / "release", kind="release", parents={"checkpoint": part.digest}) as folder:
            shutil.copytree(checkpoint, folder / "checkpoint")
            if answers:
                (folder / answers).write_text("{}")
            write(judged, folder / "report.json")
            (folder / "report.md").write_text(markdown(judged))
        registry = registries.open_registry(None, tmp_path / "workspace")
        registries.publish(registry, tmp_path / "release", "served")
        return registry

    return make


@pytest.mark.parametrize("answers", reference_answers.FILE_NAMES)
def test_a_release_is_read_from_the_registry(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], publish: Callable[..., registries.Registry], answers: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    vllm.export(tiny_checkpoint(head_dim=32), checkpoint)
    registry = publish(checkpoint, answers)
    with pytest.raises(InputError, match="no alias 'production'"):
        read_release(registry, "served")

    release = read_release(registry, "served@candidate")

    whole = manifest.read(tmp_path / "release")
    assert (release.reference, release.digest) == ("served/1", whole.digest)
    assert release.weight_bytes == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert release.size_bytes > release.weight_bytes
    assert release.dtype == "float32"
    assert release.cpu
    assert not release.plugin
    assert release.tensor_parallel == (1, 2, 4)

    weights = next((tmp_path / "workspace" / "registry").rglob("checkpoint/config.json"))
    config = json.loads(weights.read_text())
    weights.write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(IntegrityError, match=r"config\.json: not the file that was published"):
        read_release(registry, "served@candidate")


def test_a_release_that_was_not_exported_for_vllm_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], publish: Callable[..., registries.Registry]
) -> None:
    with manifest.creating(tmp_path / "plain", kind="checkpoint") as folder:
        shutil.copytree(tiny_checkpoint(), folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match="not exported for vLLM"):
        read_release(publish(tmp_path / "plain"), "served@candidate")


def test_a_release_that_needs_its_own_code_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], publish: Callable[..., registries.Registry]
) -> None:
    good = tmp_path / "good"
    facts = {**vllm.export(tiny_checkpoint(head_dim=32), good).facts, "needs": ["--trust-remote-code"]}
    with manifest.creating(tmp_path / "bad", kind="vllm", facts=facts) as folder:
        shutil.copytree(good, folder, dirs_exist_ok=True)
        (folder / manifest.FILE_NAME).unlink()
    with pytest.raises(IntegrityError, match=r"requests vLLM options .*--trust-remote-code"):
        read_release(publish(tmp_path / "bad"), "served@candidate")


def test_a_release_without_a_reference_for_its_server_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], publish: Callable[..., registries.Registry]
) -> None:
    vllm.export(tiny_checkpoint(), tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"reference-answers\.json"):
        read_release(publish(tmp_path / "checkpoint", answers=None), "served@candidate")


def test_fetching_by_digest_is_repeatable_and_exact(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], publish: Callable[..., registries.Registry]
) -> None:
    vllm.export(tiny_checkpoint(), tmp_path / "checkpoint")
    registry = publish(tmp_path / "checkpoint")
    digest = manifest.read(tmp_path / "release").digest
    out = tmp_path / "fetched"
    with pytest.raises(IntegrityError, match="was requested"):
        registries.fetch(registry, "served/1", out, digest="0" * 64)
    assert not out.exists()
    for _ in range(2):
        registries.fetch(registry, "served/1", out, digest=digest)
        assert manifest.verify(out).digest == digest
    with pytest.raises(InputError, match="exists"):
        registries.fetch(registry, "served/1", out)
    (out / "report.md").write_text("changed")
    with pytest.raises(IntegrityError, match=r"report\.md"):
        registries.fetch(registry, "served/1", out, digest=digest)
