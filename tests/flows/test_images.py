"""An image classifier through the commands and the pipeline, and refusals before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import numprune as api
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import manifest
from numprune.flows import recipe
from numprune.flows.forecast import forecast
from numprune.flows.forecast import text as forecast_text
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.prune import prune_checkpoint
from numprune.flows.steps.text import heldout_rows
from numprune.options import PruneOptions
from numprune.serving import gates
from numprune.serving import report as reports
from tests.conftest import build_tiny, write_checkpoint, write_images
from tests.flows.conftest import Answered
from tests.flows.test_optimize import optimize

Command = Callable[..., Answered]

CLASSES = ("LABEL_0", "LABEL_1")
RECIPE = """
[model]
path = "base"
[data]
calibration = ["train"]
heldout = ["heldout"]
samples = 24
[prune]
ratio = 0.25
[export]
targets = ["onnx"]
[evaluate]
prompts = []
[benchmark]
runtimes = ["onnxruntime"]
batch_sizes = [1, 4]
passes = 2
repeats = 4
[[gates]]
metric = "quality.accuracy_delta"
bound = "ci95_lower"
min = -0.9
[[gates]]
metric = "quality.metrics.top1_agreement"
bound = "point"
min = 0.1
[registry]
name = "tiny-vit"
"""


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, the images `train` and `heldout`, and `recipe.toml`."""
    folder = tmp_path_factory.mktemp("vit")
    write_checkpoint(build_tiny("vit", num_hidden_layers=1), folder / "base")
    write_images(folder / "train", 32, CLASSES)
    write_images(folder / "heldout", 26, CLASSES, seed=1)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def test_an_image_classifier_is_inspected_pruned_and_evaluated(numprune: Command, vit: Path, tmp_path: Path) -> None:
    base, out = vit / "base", tmp_path / "out"
    found = numprune("inspect", base, "--json").json
    assert (found["task"], found["image"], found["context"]) == ("image-classification", [1, 8, 8], 17)
    calibration = ["--text", vit / "train", "--samples", 20]
    made = numprune("prune", base, out, "--ratio", 0.25, "--allocation", "error", *calibration, "--json").json
    assert made["prunable_ratio_removed"] == pytest.approx(0.25, abs=0.05)
    card = (out / "README.md").read_text()
    assert "| calibration | 20 images |" in card
    assert "AutoImageProcessor" in card
    assert "pipeline_tag: image-classification" in card

    changed = numprune("evaluate", out, "--baseline", base, "--text", vit / "heldout", "--json").json
    assert (changed["tokens"], changed["documents"], changed["loss_delta"]["unit"]) == (26, 26, "nats/image")
    assert set(changed["metrics"]) == {
        "nll_nats_per_image",
        "kl_nats_per_image",
        "accuracy",
        "top1_agreement",
        "right_to_wrong",
        "wrong_to_right",
    }
    accuracy = changed["metrics"]["accuracy"]
    assert changed["accuracy_delta"]["value"] == pytest.approx(accuracy["candidate"] - accuracy["baseline"])
    assert "on 26 held-out images" in numprune("evaluate", out, "--baseline", base, "--text", vit / "heldout").out
    alone = numprune("evaluate", out, "--text", vit / "heldout", "--json").json
    assert alone["metrics"]["accuracy"] == accuracy["candidate"]
    assert numprune("evaluate", out, "--text", vit / "heldout").out.endswith("on 26 images\n")


def test_a_pruned_classifier_is_streamed_and_planned_alike(numprune: Command, vit: Path, tmp_path: Path) -> None:
    asked = [vit / "base", "--ratio", 0.25, "--text", vit / "train", "--samples", 20]
    kept = []
    for name, options in (("memory", []), ("streamed", ["--stream"])):
        assert numprune("prune", tmp_path / name, *asked[:1], *asked[1:], *options).code != 0  # OUT and MODEL swapped
        assert numprune("prune", asked[0], tmp_path / name, *asked[1:], *options).code == 0
        plan = json.loads((tmp_path / name / "numprune_plan.json").read_text())
        kept.append({block: found["kept"] for block, found in plan["blocks"].items()})
    assert kept[0] == kept[1]


def test_dimensions_of_queries_and_keys_are_pruned_and_counted(numprune: Command, vit: Path, tmp_path: Path) -> None:
    rows = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = PruneOptions(0.1, allocation="error", axes=("qk-dims",), target=api.Target(align=4))
    made = prune_checkpoint(vit / "base", rows, options, tmp_path / "pruned", torch.device("cpu"))
    kept, of = made.kept_units["layers.0.attention.qk_dims"]
    assert of == 16
    assert made.kept_units == {
        "layers.0.attention": [4, 4],
        "layers.0.attention.qk_dims": [kept, 16],
        "layers.0.mlp": [96, 96],
    }
    assert f"attention: qk dimensions by layer    {kept}" in numprune("inspect", tmp_path / "pruned").out
    step = numprune("inspect", vit / "base", "--json").json["granularity"]
    assert (step["qk-dims"]["members"], step["query-heads"]["one_layer"]) == (8, 0)
    refused = numprune("prune", vit / "base", tmp_path / "out", "--ratio", 0.1, "--axes", "qk-dims", "--text", vit)
    assert "axes: omit qk-dims, the dimensions of queries and keys: uniform allocation keeps stock" in refused.err


def test_the_api_prunes_by_images_in_memory(vit: Path) -> None:
    model = api.load(vit / "base", device="cpu")
    assert model.tokenizer is None
    rows = api.calibration_rows(vit / "train", model, samples=20)
    assert tuple(rows.tokens.shape) == (20, 1, 8, 8)
    pruned = api.prune(model, rows, api.PruneOptions(0.25, target=api.Target(align=1)))
    found = api.evaluate(pruned, vit / "heldout", baseline=model)
    assert found.accuracy is not None
    assert found.accuracy.items == 26
    with pytest.raises(InputError, match="training reads text, and this model classifies images"):
        api.recovery_rows(vit / "train", model, api.RecoveryOptions(tokens=100))
    with pytest.raises(InputError, match="vit classifies images, and vLLM, which runs quantized weights, does not"):
        api.quantize(pruned, api.Scheme("w8a8"))


def test_what_is_for_text_is_refused_by_the_commands(numprune: Command, vit: Path, tiny: Path, tmp_path: Path) -> None:
    base, out = vit / "base", tmp_path / "out"
    pruning = ["prune", base, out, "--ratio", 0.25, "--text"]
    for command, said in (
        ([*pruning, vit / "train", "--sequence-length", 64], "--sequence-length 64: the model reads images"),
        ([*pruning, vit / "train", "--chat"], "split, chat and pack are for text, and the model reads images"),
        ([*pruning, vit / "train", "--samples", 99], "--samples: there are 32 calibration images, but 99 samples"),
        ([*pruning, tiny / "train.txt"], "train.txt: give the folder of the images"),
        (["learn", base, out, "--ratio", 0.2, "--text", vit / "train"], "learning masks reads text, and this model"),
        (["export", base, out, "--to", "vllm"], "vLLM does not serve image classifiers; leave vllm out"),
        (
            ["benchmark", base, "--baseline", base, "--runtime", "torch", "--lengths", 8],
            "--lengths: the model reads images, which all have one size; omit it",
        ),
        (["tasks", base, "--tasks", "arc_easy"], "image-classification"),
    ):
        found = numprune(*command)
        assert (found.code, said in found.err) == (1, True), found.err
    assert not out.exists()


def test_what_a_recipe_cannot_do_with_images_is_refused_before_any_work(vit: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", 2, ["zebra"])
    asked = recipe.load(
        vit / "recipe.toml",
        [
            'export.targets=["vllm", "onnx"]',
            "data.sequence_length=64",
            "data.calibration=embedded",
            f'data.heldout=["{tmp_path / "other"}"]',
            "benchmark.lengths=[8]",
            "recover.method=distill",
            "learn.method=vib",
            "quantize.scheme=w8a8",
        ],
    )
    with pytest.raises(InputError) as caught:
        check(asked, tmp_path / "w")
    for problem in (
        "export.targets: vLLM does not serve image classifiers; leave vllm out",
        "data.sequence_length = 64: the model reads images, which all have one size; omit it",
        "data.calibration: the model reads images, and the embedded text has none; give folders of images",
        "data.heldout: zebra/000.png: label 'zebra' is not a class of the model; its classes are LABEL_0, LABEL_1",
        "benchmark.lengths = [8]: the model reads images, which all have one size; omit it",
        "recover.method: trains on text, and the model reads images; omit it",
        "learn.method: trains on text, and the model reads images; omit it",
        "quantize.scheme = 'w8a8': quantization: vit classifies images",
    ):
        assert problem in str(caught.value)


def test_gates_on_labels_that_no_image_has_are_refused_before_any_work(vit: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 6, seed=2)
    train = write_images(tmp_path / "animals", 24, ["cat", "dog"], seed=1)  # calibration needs no classes of the model
    asked = recipe.load(vit / "recipe.toml", [f'data.heldout=["{tmp_path / "flat"}"]', f'data.calibration=["{train}"]'])
    with pytest.raises(InputError) as caught:
        check(asked, tmp_path / "w")
    assert "1 problem" in str(caught.value)
    assert "gates.0.metric = 'quality.accuracy_delta': data.heldout has no labels" in str(caught.value)
    corpora = f'data.heldout={{ one = ["{vit / "heldout"}"], other = ["{tmp_path / "flat"}"] }}'
    check(recipe.load(vit / "recipe.toml", [corpora]), tmp_path / "w")  # gates are on the first
    asked = recipe.load(
        vit / "recipe.toml",
        [corpora, 'gates=[{metric="quality.corpora.other.metrics.accuracy.candidate", bound="point", min=0.5}]'],
    )
    with pytest.raises(InputError, match=r"data\.heldout\.other has no labels"):
        check(asked, tmp_path / "w")


@pytest.mark.parametrize(
    ("classes", "shown"),
    [
        # As transformers' own example of training writes it.
        ({"label2id": {"cat": "0", "dog": "1", "owl": "2"}, "id2label": {"0": "cat", "1": "dog", "2": "owl"}}, "owl"),
        ({"id2label": {"0": "cat", "1": "dog", "2": "owl"}}, "owl"),
        # As in ImageNet, whose 134 and 517 are both "crane".
        ({"label2id": {"cat": 0, "crane": 2}, "id2label": {"0": "cat", "1": "crane", "2": "crane"}}, "2"),
    ],
)
def test_classes_are_read_as_checkpoints_write_them(
    numprune: Command, tmp_path: Path, classes: dict[str, dict[str, object]], shown: str
) -> None:
    folders = []
    for chosen in (0, 2):
        model = build_tiny("vit", num_hidden_layers=1, num_labels=3)
        model.classifier.bias.data[chosen] = 100.0
        folders.append(write_checkpoint(model, tmp_path / str(chosen)))
        config = json.loads((folders[-1] / "config.json").read_text())
        kept = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
        (folders[-1] / "config.json").write_text(json.dumps(kept | classes))
    base, other = folders
    images = write_images(tmp_path / "images", 6, ["cat"])
    found = numprune("evaluate", other, "--baseline", base, "--text", images, "--json")
    assert found.code == 0, found.err
    assert found.json["metrics"]["accuracy"] == {"baseline": 1.0, "candidate": 0.0}
    rows = heldout_rows([images], None, [base], Reading())
    section = compare_checkpoints([other], base, rows, torch.device("cpu"))[0]
    assert {(one["baseline"], one["candidate"]) for one in section["changed"]} == {("cat", shown)}


def test_an_image_that_is_calibrated_on_is_not_held_out(vit: Path, tmp_path: Path) -> None:
    heldout = shutil.copytree(vit / "heldout", tmp_path / "heldout")
    shutil.copy(vit / "train" / "LABEL_0" / "000.png", heldout / "LABEL_1" / "copy.png")
    corpora = f'data.heldout={{ one = ["{vit / "heldout"}"], other = ["{heldout}"] }}'
    said = r"data\.heldout\.other: 1 file also in data\.calibration, so not held out; .*copy\.png is the same as .*"
    with pytest.raises(InputError, match=said + r"000\.png") as caught:
        check(recipe.load(vit / "recipe.toml", [corpora]), tmp_path / "w")
    assert "1 problem" in str(caught.value)


def test_duplicates_among_held_out_images_are_counted_in_a_warning(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", 2, CLASSES)
    for number in (1, 2):
        shutil.copy(images / "LABEL_0" / "000.png", images / "LABEL_0" / f"again{number}.png")
    assert len(heldout_rows([images], None, [vit / "base"], Reading()).rows) == 2
    assert "2 duplicates of held-out images, with the same pixels and label" in caplog.text


def test_classes_that_are_contradictory_are_refused(numprune: Command, vit: Path, tmp_path: Path) -> None:
    base = shutil.copytree(vit / "base", tmp_path / "base")
    classes = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 2}}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | classes))
    found = numprune("evaluate", base, "--text", vit / "heldout")
    assert (found.code, "label2id has index '2' for 'LABEL_1'; indices must be 0 to 1" in found.err) == (1, True)


def test_a_forecast_counts_images(vit: Path, tmp_path: Path) -> None:
    found = forecast(recipe.load(vit / "recipe.toml"), tmp_path / "w")
    assert found["text"] == {"samples": 24, "sequence_length": 17, "calibration_images": 32, "heldout_images": 26}
    assert "calibration: 24 of 32 images; held out: 26 images" in forecast_text(found)


@pytest.mark.slow
def test_an_image_classifier_goes_from_recipe_to_release(numprune: Command, vit: Path, tmp_path: Path) -> None:
    answered = optimize(numprune, vit, tmp_path / "w")
    assert answered.code == 0, answered.err
    release = Path(answered.json["release"])
    manifest.verify(release)
    report = reports.read(release / "report.json")
    gates.confirm(report)
    assert report.quality is not None
    assert (report.quality.task, report.quality.tokens) == ("image-classification", 26)
    assert list(report.speed["onnxruntime"].shapes) == ["1x17", "4x17"]
    assert report.parity["onnxruntime"]["output_error_max"] < 1e-4
    page = (release / "report.html").read_text()
    assert "Quality on held-out images" in page
    assert "Attention on images, before and after pruning" in page
    assert {path.name for path in release.iterdir() if path.is_dir()} == {"checkpoint", "onnx"}
    assert (release / "onnx" / "preprocessor_config.json").is_file()
