"""An encoder through the pipeline and the comparison, and refusals before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numprune.errors import InputError
from numprune.export import manifest
from numprune.flows import recipe
from numprune.flows.steps.checks.recipe import check
from numprune.serving import gates, reference_answers
from numprune.serving import report as reports
from tests.conftest import build_tiny, write_checkpoint
from tests.flows.conftest import Answered, write_inputs
from tests.flows.test_optimize import optimize

Command = Callable[..., Answered]

RECIPE = """
[model]
path = "base"
[data]
calibration = "train.txt"
heldout = "heldout.jsonl"
samples = 12
sequence_length = 64
[prune]
ratio = 0.25
[export]
targets = ["vllm", "onnx"]
[benchmark]
runtimes = ["onnxruntime"]
lengths = [8, 32]
batch_sizes = [1, 4]
passes = 2
repeats = 4
[[gates]]
metric = "quality.loss_delta"
bound = "ci95_upper"
max = 1.9
[[gates]]
metric = "quality.metrics.similarity_spearman"
bound = "point"
min = 0.1
[registry]
name = "tiny-encoder"
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (a sentence embedding model), `train.txt`, `heldout.jsonl` and `recipe.toml`."""
    model = build_tiny("bert", task="embedding", num_hidden_layers=1, num_attention_heads=2, head_dim=32)
    return write_inputs(tmp_path_factory.mktemp("encoder"), model, RECIPE)


@pytest.mark.slow
def test_an_embedding_model_goes_from_recipe_to_release(numprune: Command, encoder: Path, tmp_path: Path) -> None:
    answered = optimize(numprune, encoder, tmp_path / "w")
    assert answered.code == 0, answered.err
    release = Path(answered.json["release"])
    manifest.verify(release)
    report = reports.read(release / "report.json")
    gates.confirm(report)
    assert report.quality is not None
    assert (report.quality.task, report.quality.loss_delta.unit) == ("embedding", "1 - cosine")
    assert report.quality.documents == 24
    assert report.verdict is not None
    assert 0 < report.quality.loss_delta.value < 0.5
    assert list(report.speed["onnxruntime"].shapes) == ["1x8", "4x8", "1x32", "4x32"]
    assert report.sizes is not None
    assert report.sizes.kv_bytes_per_token is None
    assert report.pruning is not None
    assert report.pruning.ratio_removed.kv_bytes is None
    assert set(report.parity) == {"vllm", "onnxruntime"}
    assert all(found["output_error_max"] < 1e-4 for found in report.parity.values())
    reference = reference_answers.read(release)
    assert isinstance(reference, reference_answers.PooledAnswers)
    assert {len(text.values) for text in reference.inputs} == {64}
    assert "4 \N{MULTIPLICATION SIGN} 32 tokens" in (release / "report.md").read_text()

    pruned, base = release / "checkpoint", encoder / "base"
    found = numprune("evaluate", pruned, "--baseline", base, "--text", encoder / "heldout.jsonl", "--json").json
    assert found["loss_delta"]["value"] == pytest.approx(report.quality.loss_delta.value, rel=1e-5)
    assert found["metrics"] == pytest.approx(report.quality.metrics, rel=1e-5)
    said = numprune("evaluate", pruned, "--baseline", base, "--text", encoder / "heldout.jsonl").out
    assert "Distance from baseline +0.0" in said


def test_options_that_do_not_apply_to_encoders_are_refused_before_any_work(encoder: Path, tmp_path: Path) -> None:
    asked = recipe.load(
        encoder / "recipe.toml",
        [
            'export.targets=["vllm", "tensorrt"]',
            'benchmark.runtimes=["torch", "vllm"]',
            "benchmark.lengths=[8, 1000]",
            'evaluate.prompts=["Hello"]',
            "benchmark.torch_mode=compiled",
            "recover.top_k=50",
            "gates=[{metric='quality.perplexity_ratio', bound='point', max=2}]",
        ],
    )
    with pytest.raises(InputError) as caught:
        check(asked, tmp_path / "w")
    for problem in (
        "benchmark.runtimes: vllm times generation, which embedding models do not have; they are timed in torch",
        "export.targets: engines are built only for decoders; omit tensorrt",
        "evaluate.prompts: embedding models do not generate; omit it",
        "benchmark.torch_mode = 'compiled': only decoding is compiled, and embedding models do not generate; omit",
        "recover.top_k: only for causal language models, and the model is for embedding; omit it",
        "benchmark.lengths = [8, 1000]: the model takes at most 256 tokens",
        "gates.0.metric = 'quality.perplexity_ratio': only causal-lm models have it, and this model's task is embed",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("family", "task", "said"),
    [
        ("bert", "masked-lm", "export.targets: vLLM does not serve masked language models; leave vllm out"),
        ("distilbert", "embedding", "vLLM does not serve distilbert for embedding; it serves bert, roberta. Leave"),
    ],
)
def test_an_encoder_unsupported_by_vllm_is_refused_as_a_vllm_target(
    encoder: Path, tmp_path: Path, family: str, task: Any, said: str
) -> None:
    base = write_checkpoint(build_tiny(family, task=task), tmp_path / "base")
    asked = recipe.load(encoder / "recipe.toml", [f"model.path={base}"])
    with pytest.raises(InputError, match=r"export\.targets: vLLM does not serve") as caught:
        check(asked, tmp_path / "w")
    assert said in str(caught.value)


def test_encoder_options_are_refused_for_decoders(numprune: Command, tiny: Path, encoder: Path) -> None:
    base = tiny / "base"
    found = numprune("benchmark", base, "--baseline", base, "--runtime", "torch", "--lengths", "8")
    assert found.code == 1
    assert "--batch-sizes, --lengths and --passes are for encoders, but it is a decoder" in found.err
    base = encoder / "base"
    found = numprune("benchmark", base, "--baseline", base, "--runtime", "tensorrt")
    assert found.code == 1
    assert "tensorrt times generation, which embedding models do not have" in found.err
