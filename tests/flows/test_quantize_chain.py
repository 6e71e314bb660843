"""The whole pipeline with quantization: a killed stage, a published release, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.export import checkpoint, manifest
from numprune.export.format_parity import check_format
from numprune.flows.recipe import load
from numprune.flows.steps.checks.recipe import check
from numprune.serving import reference_answers
from numprune.serving import report as reports
from numprune.serving.reference_answers import CompletionAnswers
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, Answered, write_inputs
from tests.flows.faults import command, finish, flip_a_bit, kill_in, stage

pytestmark = pytest.mark.slow

# Attention of four heads of 16 channels, an MLP of 96: groups of 32 leave both something to remove.
QUANTIZED = ("quantize.scheme=w4a16", "quantize.group_size=32")


@pytest.fixture(scope="module")
def published(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a run whose quantize stage was killed first; not to be written to."""
    folder = tmp_path_factory.mktemp("quantized")
    added = (
        '[quantize]\nscheme = "w4a16"\ngroup_size = 32\nlm_head_bits = 4\n[export]\ntargets = ["vllm", "onnxruntime"]\n'
    )
    recipe_path = write_inputs(folder, build_tiny().bfloat16(), RECIPE + added) / "recipe.toml"
    workspace = folder / "w"
    kill_in(folder / "control", "quantize", "write", command(recipe_path, workspace))
    assert list((workspace / "stages").glob(".quantize-*.partial"))
    found = finish(recipe_path, workspace)
    assert {one["name"]: one["reused"] for one in found["stages"]}["prune"]
    assert not list(workspace.rglob(".*.partial"))
    return Path(found["release"])


def test_the_release_holds_the_quantized_checkpoint_and_describes_it(published: Path) -> None:
    manifest.verify(published)
    report = reports.read(published / "report.json")
    assert report.quantization is not None
    assert (report.quantization.scheme, report.quantization.group_size) == ("w4a16", 32)
    assert report.quantization.lm_head_bits == 4
    schemes = checkpoint.quantized(checkpoint.audit(published / "checkpoint"))
    assert len(schemes) == 2 * 7
    assert {str(scheme) for scheme in schemes.values()} == {"w4a16, groups of 32"}

    pruned = stage(published.parents[1], "prune") / "checkpoint"
    assert report.identity.pruned == manifest.read(pruned).digest
    assert report.sizes is not None
    assert report.sizes.weight_bytes is not None
    assert report.sizes.weight_bytes.candidate == checkpoint.weight_bytes(published / "checkpoint")
    assert report.quantization.weight_bytes.baseline == checkpoint.weight_bytes(pruned)
    assert report.parity["vllm"]["format"]["matrices"] == 14  # type: ignore[call-overload, index]
    rounded = {"weights": "w4a16, groups of 32", "activations": "int8", "output_matrix": "int4"}
    assert report.parity["onnxruntime"]["rounded"] == rounded
    sides = report.speed["onnxruntime"].runtime
    assert (sides["candidate"]["rounded"], "rounded" in sides["baseline"]) == (rounded, False)
    assert report.identity.exports["onnxruntime"] == manifest.read(published / "onnxruntime").digest
    text = (published / "report.md").read_text()
    assert "quantized to w4a16, 32 channels per scale, by gptq" in text
    assert "The values of the output matrix are rounded to 4 bits." in text
    assert "of which by quantization" in text
    assert "of which by quantization" in (published / "report.html").read_text()


def test_quality_is_compared_with_the_dense_and_the_pruned_model(
    published: Path, numprune: Callable[..., Answered]
) -> None:
    inputs = published.parents[2]
    quality = reports.read(published / "report.json").quality
    assert quality is not None
    assert quality.quantization_loss_delta is not None
    pruned = stage(published.parents[1], "prune") / "checkpoint"
    for baseline, delta in ((inputs / "base", quality.loss_delta), (pruned, quality.quantization_loss_delta)):
        answered = numprune(
            *("evaluate", published / "checkpoint", "--baseline", baseline, "--json"),
            *("--text", inputs / "heldout.jsonl", "--sequence-length", 64),
        )
        assert answered.code == 0, answered.err
        assert answered.json["nll_delta_nats_per_token"]["value"] == pytest.approx(delta.value, abs=1e-6)
    delta = quality.quantization_loss_delta
    assert delta.ci95_upper is not None
    assert delta.ci95_lower is not None
    for limit, code in ((delta.ci95_upper + 1e-6, 0), (delta.ci95_lower - 1e-6, 2)):
        policy = inputs / "policy.toml"
        policy.write_text(
            f'[[gates]]\nmetric = "quality.quantization_loss_delta"\nbound = "ci95_upper"\nmax = {limit}\n'
        )
        assert numprune("gate", published / "report.json", "--policy", policy).code == code


def logprobs(folder: Path, answers: CompletionAnswers) -> torch.Tensor:
    """The checkpoint's log-probabilities for the tokens of the answers."""
    model, _ = checkpoint.load(folder)
    found = []
    for prompt in answers.prompts:
        tokens = torch.tensor([*prompt.tokens, *prompt.greedy])
        with torch.no_grad():
            found.append(model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0])
    return torch.cat(found)


def change(folder: Path, name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_damaged_quantized_checkpoint_is_blocked(published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published / "checkpoint", tmp_path / "checkpoint"))
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="SHA-256"):
        manifest.verify(folder)

    scale = "model.layers.1.mlp.down_proj.weight_scale"
    folder = Path(shutil.copytree(published / "checkpoint", tmp_path / "scale"))
    change(folder, scale, lambda found: -found)
    with pytest.raises(ParityError, match=scale):
        check_format(published / "checkpoint", folder)
    answers = reference_answers.read(published)
    assert isinstance(answers, CompletionAnswers)
    expected = torch.tensor(
        [value for prompt in answers.prompts for value in (*prompt.logprobs, *prompt.greedy_logprobs)]
    )
    assert answers.noise_floor.keys() == {"bfloat16", "float16"}
    assert answers.tolerance("bfloat16").p99 is not None
    tolerance = answers.tolerance("float32")
    right, wrong = ((logprobs(one, answers) - expected).abs() for one in (published / "checkpoint", folder))
    assert float(right.max()) <= tolerance.worst
    assert float(wrong.mean()) > tolerance.mean

    folder = Path(shutil.copytree(published / "checkpoint", tmp_path / "group"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="weight"):
        checkpoint.audit(folder)

    folder = Path(shutil.copytree(published / "checkpoint", tmp_path / "unquantized"))
    pruned = stage(published.parents[1], "prune") / "checkpoint"
    shutil.copyfile(pruned / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="quantization_config"):
        checkpoint.audit(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quantize.scheme=w4a16"],
            r"quantize\.group_size = 128: does not divide the model's hidden_size 64; .* 32 or 64",
        ),
        (
            ["quantize.scheme=w8a8"],
            r"quantize\.scheme = 'w8a8': the graph of the export onnx rounds no activations; .* in export\.targets",
        ),
        (
            ["quantize.scheme=fp8", "export.targets=['onnxruntime']"],
            r"quantize\.scheme: onnxruntime: .* no FP8 weights",
        ),
        (
            ["quantize.scheme=fp8", "quantize.lm_head_bits=4"],
            r"quantize\.lm_head_bits is 4, .*; use 8: .* no FP8 weights(?s:.*)lm_head_bits = 4: only the export",
        ),
        (
            ["quantize.scheme=w8a8", "quantize.lm_head_bits=4", "prune.hidden_size=48"],
            r"quantize\.lm_head_bits is 4: groups of 32 do not divide .* hidden_size 48; use 8",
        ),
        ([*QUANTIZED, "target.tensor_parallel=4"], r"prune: layers\.0\.attention: none of its sizes"),
        ([*QUANTIZED, "export.targets=['tensorrt']"], r"'w4a16': engines are built only from unquantized checkpoints"),
        ([*QUANTIZED], r"stored in float32, and vLLM's kernels for w4a16 on a GPU compute in bfloat16 or float16"),
    ],
)
def test_unsupported_quantization_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check(load(tiny / "recipe.toml", overrides), tmp_path)
