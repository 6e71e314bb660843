"""Image generators through the command line and the pipeline, and refusals before any work."""

import base64
import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from numprune.decoding import Palette
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.export.decoders import PALETTE, load_decoder
from numprune.flows import forecast, recipe
from numprune.flows.embedded import images as digits
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps import fid
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.images import contact_sheet
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.results import ImageFeatures
from numprune.flows.steps.text import load_heldout
from numprune.flows.studies.compare import steps as compare
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.report.models import Images
from tests.conftest import build_tiny
from tests.flows.conftest import Answered
from tests.flows.test_optimize import optimize
from tests.numprune.llamagen import reference, tokenizer_reference

Command = Callable[..., Answered]

RECIPE = """
[model]
path = "base"
[data]
calibration = "train.safetensors"
heldout = "heldout.safetensors"
samples = 24
sequence_length = 65
[prune]
ratio = 0.3
allocation = "error"
[export]
targets = ["onnx"]
[evaluate]
samples = 6
guidance = 1.5
decoder = "vq.safetensors"
fid_network = "network.pt"
fid_images = ["real"]
fid_samples = 20
[benchmark]
runtimes = ["torch"]
prompts = 2
prompt_length = 1
output_length = 8
repeats = 4
[[gates]]
metric = "quality.loss_delta"
bound = "ci95_upper"
max = 5.0
[[gates]]
metric = "quality.images.guided_kl_nats_per_code"
bound = "point"
max = 5.0
[[gates]]
metric = "quality.images.fid.delta"
bound = "ci95_upper"
max = 1000.0
[[gates]]
metric = "quality.images.inception_score.delta"
bound = "ci95_lower"
min = -10.0
[registry]
name = "tiny-generator"
"""
CODES, CLASSES = 30, 3


class Colours(torch.nn.Module):
    """The mean colours of images as features, and their softmax as classes."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = images.float().mean((2, 3))
        return found, found / 10


def write_network(file: Path) -> None:
    with warnings.catch_warnings():  # TorchScript is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(str(file))


def write_pictures(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for index, pixels in enumerate(levels):
        Image.fromarray(pixels).save(folder / f"{index:02}.png")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` (without a tokenizer), images of both parts, and `recipe.toml`."""
    folder = tmp_path_factory.mktemp("generator")
    sizes = {"vocab_size": CODES + CLASSES + 1, "max_position_embeddings": 65, "num_hidden_layers": 1}
    build_tiny("llamagen", **sizes).save_pretrained(folder / "base")
    colours = np.linspace(-1, 1, 3 * CODES).reshape(CODES, 3)
    (folder / "base" / PALETTE).write_text(json.dumps({"clusters": colours.tolist()}))
    draw = torch.Generator().manual_seed(0)
    for name, count in (("train", 30), ("heldout", 12)):
        codes = torch.randint(CODES, (count, 64), generator=draw)
        save_file({"codes": codes, "labels": torch.arange(count) % CLASSES}, folder / f"{name}.safetensors")
    save_file(tokenizer_reference.random_state(codes=CODES), folder / "vq.safetensors")
    write_network(folder / "network.pt")
    write_pictures(folder / "real", 15, 32)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.mark.slow
def test_a_generator_goes_from_recipe_to_release(numprune: Command, generator: Path, tmp_path: Path) -> None:
    answered = optimize(numprune, generator, tmp_path / "w")
    assert answered.code == 0, answered.err
    release = Path(answered.json["release"])
    manifest.verify(release)
    report = reports.read(release / "report.json")
    gates.confirm(report)
    found = report.quality
    assert found is not None
    assert (found.task, found.documents, found.tokens) == ("causal-lm", 12, 12 * 64)
    assert [(one.label, one.images) for one in found.classes] == [(0, 4), (1, 4), (2, 4)]
    assert found.baseline is not None
    assert found.baseline.nll_nats_per_token == pytest.approx(np.mean([one.baseline for one in found.classes]))
    assert found.images is not None
    assert (found.images.samples, found.images.guidance) == (6, 1.5)
    assert found.images.guided_kl_nats_per_code > 0
    assert 0 < found.images.code_divergence_nats < np.log(2)
    assert found.images.sheet is not None
    assert shown(found.images.sheet).shape == (2 * 32 + 4, 6 * 36 - 4, 3)  # 32 pixels a side, four for each code
    assert report.identity.decoder == manifest.sha256_file(generator / "vq.safetensors")
    assert found.images.network is not None
    facts = found.images.network
    assert (facts.file, facts.features, facts.samples, facts.real_images) == ("network.pt", 3, 20, 15)
    fid, score = found.images.fid, found.images.inception_score
    assert fid is not None
    assert fid.published is not None
    assert fid.delta.value == pytest.approx(fid.candidate.value - fid.baseline.value)
    assert fid.delta.samples == 20
    assert score is not None
    assert 1 <= score.published.baseline <= 3
    page = (release / "report.html").read_text(encoding="utf-8")
    assert f"data:image/png;base64,{found.images.sheet}" in page
    assert "NLL by class, nats/code" in page
    assert "numprune serve" not in (release / "report.md").read_text(encoding="utf-8")
    assert not (release / "reference-answers.json").exists()
    assert report.parity["onnxruntime"]["logit_error_max"] < 1e-4
    assert checkpoint.read_config(release / "checkpoint").model_type == "llamagen"
    assert (release / "checkpoint" / PALETTE).is_file()

    base, pruned = generator / "base", release / "checkpoint"
    compared = numprune("evaluate", pruned, "--baseline", base, "--text", generator / "heldout.safetensors", "--json")
    assert compared.json["nll_delta_nats_per_token"]["value"] == pytest.approx(found.loss_delta.value, rel=1e-5)


def test_options_for_language_models_are_refused_before_any_work(generator: Path, tmp_path: Path) -> None:
    asked = recipe.load(
        generator / "recipe.toml",
        [
            "data.heldout=embedded",
            'export.targets=["vllm", "tensorrt"]',
            'evaluate.prompts=["Hello"]',
            "data.sequence_length=66",
        ],
    )
    with pytest.raises(InputError) as caught:
        check(asked, tmp_path / "w")
    for problem in (
        'data.heldout = "embedded": the model generates images; give files of codes',
        "evaluate.prompts: the model generates images; omit it",
        "vLLM does not run llamagen; leave vllm out",
        "export.targets: engines are built only for language models; omit tensorrt",
        "data.sequence_length = 66: the model takes at most 65 tokens",
    ):
        assert problem in str(caught.value)


def test_colours_of_other_codes_are_refused_before_any_work(generator: Path, tmp_path: Path) -> None:
    shutil.copytree(generator / "base", tmp_path / "base")
    (tmp_path / "base" / PALETTE).write_text(json.dumps({"clusters": [[0, 0, 0]]}))
    asked = recipe.load(generator / "recipe.toml", [f"model.path={tmp_path / 'base'}", "evaluate.decoder=none"])
    with pytest.raises(InputError, match=f"model.path: .*{PALETTE}: clusters must be {CODES} colours"):
        check(asked, tmp_path / "w")


def test_guidance_needs_an_image_generator_with_classes(generator: Path, tiny: Path, tmp_path: Path) -> None:
    asked = recipe.load(
        tiny / "recipe.toml",
        ["evaluate.guidance=2", "evaluate.samples=8", "evaluate.decoder=vq.pt", "evaluate.fid_samples=9"],
    )
    with pytest.raises(InputError, match=r"evaluate.guidance = 2.0: the model is not an image generator") as found:
        check(asked, tmp_path / "w")
    assert "evaluate.samples = 8: the model is not an image generator; omit it" in str(found.value)
    assert "evaluate.fid_samples = 9: the model is not an image generator; omit it" in str(found.value)
    assert 'vq.pt": the model is not an image generator; omit it' in str(found.value)
    build_tiny("imagegpt", max_position_embeddings=65).save_pretrained(tmp_path / "imagegpt")
    asked = recipe.load(generator / "recipe.toml", [f"model.path={tmp_path / 'imagegpt'}"])
    with pytest.raises(InputError, match=r"evaluate.guidance = 1.5: the model has no classes; omit it"):
        check(asked, tmp_path / "w")


def test_samples_are_compared_with_real_images(generator: Path, tmp_path: Path) -> None:
    """Of a model and of itself: nothing differs, and the first samples are those of the contact sheet."""
    vq, network, cpu = generator / "vq.safetensors", generator / "network.pt", torch.device("cpu")
    folders = [tmp_path / name for name in ("real", "baseline", "candidate")]
    for folder in folders:
        folder.mkdir()
    base = generator / "base"
    assert fid.real_features(folders[0], base, [str(generator / "real")], vq, network, cpu) == ImageFeatures(15, 3, 3)
    for folder in folders[1:]:
        assert fid.sampled_features(folder, base, base, 20, 1.5, vq, network, cpu) == ImageFeatures(20, 3, 3)
    read = [np.asarray(Image.open(file)).mean((0, 1)) for file in sorted((generator / "real").iterdir())]
    np.testing.assert_allclose(load_file(folders[0] / "features.safetensors")["features"], read, rtol=1e-5)
    found = fid.metrics(*folders, "network.pt")
    assert found.fid["delta"]["interval95"] == found.kid["delta"]["interval95"] == (0, 0)
    assert found.fid["published"]["baseline"] == found.fid["published"]["candidate"] > 0
    assert found.inception_score is not None
    assert found.inception_score["delta"]["value"] == 0
    facts = {"samples": 6, "guidance": 1.5, "code_divergence_nats": 0, "code_divergence_of_dense_nats": 0}
    assert Images.model_validate({**facts, **asdict(found)}).network.real_images == 15


def test_a_plan_shows_how_samples_are_compared(generator: Path, tmp_path: Path) -> None:
    run = prepare(recipe.load(generator / "recipe.toml"), tmp_path / "w")
    names = [stage.name for stage in forecast.planned(run)]
    assert names.index("real-features") < names.index("prune")
    drawn = names.index("sampled features baseline")
    found = forecast.text(forecast.forecast(recipe.load(generator / "recipe.toml"), tmp_path / "w"))
    assert "calibration: 24 of 30 images; held out: 12 images" in found
    assert names[drawn : drawn + 3] == ["sampled features baseline", "sampled features candidate", "fid"]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            ["evaluate.fid_network=none"],
            ["evaluate.fid_images: there is no evaluate.fid_network; name its file", "gates.2"],
        ),
        (["evaluate.decoder=none", "model.path=plain"], ["fid_network: nothing turns the model's codes into pictures"]),
        (
            ["evaluate.fid_samples=11"],
            ["evaluate.fid_samples = 11: must be at least 12, 4 for each of the network's 3 f"],
        ),
        (["evaluate.fid_samples=19"], ["evaluate.fid_samples = 19: must be at least 20 for the Inception Score"]),
        (["evaluate.fid_images=few"], ["evaluate.fid_images: there are 3; there must be at least 12"]),
        (
            ["evaluate.fid_images=large"],
            ["fid_images: image 00.png has 33 x 33 pixels, but the model's images have 32 x"],
        ),
        (["evaluate.fid_images=[]"], ["evaluate.fid_images: there are 0; there must be at least 12"]),
        (["evaluate.fid_network=gone.pt"], ["evaluate.fid_network: ", "gone.pt: no such file"]),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_any_work(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], messages: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "few", 3, 32)
    write_pictures(tmp_path / "large", 1, 33)
    shutil.copytree(generator / "base", tmp_path / "plain", ignore=shutil.ignore_patterns(PALETTE))
    with pytest.raises(InputError) as caught:
        check(recipe.load(generator / "recipe.toml", changes), tmp_path / "w")
    for message in messages:
        assert message in str(caught.value)


def test_a_decoder_of_another_codebook_is_refused_before_any_work(generator: Path, tmp_path: Path) -> None:
    save_file(tokenizer_reference.random_state(codes=31), tmp_path / "vq.safetensors")
    asked = recipe.load(generator / "recipe.toml", [f"evaluate.decoder={tmp_path / 'vq.safetensors'}"])
    with pytest.raises(
        InputError, match=r"evaluate.decoder: .*vq\.safetensors: its codebook has 31 codes, and the model"
    ):
        check(asked, tmp_path / "w")


def test_a_published_file_is_converted_and_pruned(numprune: Command, tmp_path: Path) -> None:
    torch.save({"model": reference.random_state()}, tmp_path / "c2i.pt")
    made = numprune("convert", tmp_path / "c2i.pt", tmp_path / "base", "--codes-per-image", 16, "--heads", 4, "--json")
    assert made.code == 0, made.err
    assert {name: made.json[name] for name in ("layers", "heads", "codes", "classes")} == {
        "layers": 2,
        "heads": 4,
        "codes": 40,
        "classes": 3,
    }
    np.save(tmp_path / "train.npy", np.arange(20 * 16).reshape(20, 16) % 40)
    options = ("--text", tmp_path / "train.npy", "--samples", 16, "--sequence-length", 17, "--ratio", 0.3, "--align", 1)
    pruned = numprune("prune", tmp_path / "base", tmp_path / "out", *options, "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["prunable_ratio_removed"] >= 0.3
    judged = ("--text", tmp_path / "train.npy", "--sequence-length", 17)
    told = numprune("evaluate", tmp_path / "out", "--baseline", tmp_path / "base", *judged).out
    assert told.count(" nats/code on 320 codes of 20 images") == 2
    assert "(20 images), KL " in told
    assert "token" not in told
    refused = numprune("export", tmp_path / "out", tmp_path / "vllm", "--to", "vllm")
    assert refused.code == 1
    assert "vLLM does not run llamagen; leave vllm out" in refused.err


def test_methods_are_compared_on_images(generator: Path, tmp_path: Path) -> None:
    files = {name: Text([str(generator / f"{name}.safetensors")], "") for name in ("train", "heldout")}
    found = compare.make_text(
        tmp_path,
        model=Artifact(generator / "base", ""),
        text=files["train"],
        heldout=files["heldout"],
        samples=[8],
        sequence_length=65,
        seed=0,
        reading=Reading(),
    )
    rows = compare.load_rows(tmp_path, 8)
    assert rows.shape == (8, 65)
    assert (rows[:, 0] >= CODES).all()
    assert load_heldout(tmp_path, found.heldout.digest).labels == [index % CLASSES for index in range(12)]


def test_a_contact_sheet_shows_each_image_above_its_pair() -> None:
    colours = Palette(torch.tensor([[0, 0, 0], [255, 255, 255], [10, 20, 30]], dtype=torch.uint8), 2)
    dense, ours = torch.tensor([[0, 1, 1, 0], [2, 2, 2, 2]]), torch.tensor([[0, 1, 1, 1], [2, 2, 2, 0]])
    pixels = shown(contact_sheet(colours.pictures(dense), colours.pictures(ours)))
    assert pixels.shape == (100, 100, 3)  # two images of 48 pixels and a gap of 4, in both directions
    middles = [12, 36]

    def image(left: int, top: int) -> list[list[int]]:
        return [[int(pixels[top + y, left + x, 0]) for x in middles] for y in middles]

    assert image(0, 0) == [[0, 255], [255, 0]]
    assert image(0, 52) == [[0, 255], [255, 255]]
    assert image(52, 0) == [[10, 10], [10, 10]]
    assert image(52, 52) == [[10, 10], [10, 0]]


def test_a_contact_sheet_of_large_images_fits_a_report() -> None:
    noise = torch.randint(256, (70, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = contact_sheet(noise, noise)
    assert shown(sheet).shape == (6 * (2 * 80 + 12) - 8, 10 * 84 - 4, 3)
    empty = {"samples": 70, "guidance": 1, "code_divergence_nats": 0, "code_divergence_of_dense_nats": 0}
    assert Images.model_validate({**empty, "sheet": sheet}).sheet == sheet


def shown(sheet: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))))


def test_the_digits_generator_is_trained_and_its_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn.datasets")
    build, threads, used = digits.build_model, torch.get_num_threads(), set()

    def watched() -> torch.nn.Module:
        model = build()
        model.register_forward_hook(lambda *_: used.add(torch.get_num_threads()))
        return model

    monkeypatch.setattr(digits, "build_model", watched)
    words = [str(tmp_path / "out"), "--steps", "4", "--batch-size", "8", "--learning-rate", "1e-2"]
    monkeypatch.setattr(sys, "argv", ["images", *words])
    torch.set_num_threads(2)
    try:
        assert digits.main() == 0
        assert (used, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert digits.main() == 1
    assert "already exists; choose another folder or remove it" in capsys.readouterr().err
    model, _ = checkpoint.load(tmp_path / "out" / "model")
    held_out = load_file(tmp_path / "out" / "heldout.safetensors")
    train = load_file(tmp_path / "out" / "train.safetensors")
    assert (len(held_out["codes"]), len(train["codes"])) == (500, 1297)
    rows = digits.rows_of(held_out["codes"], held_out["labels"])
    nll = digits.mean_nll(model, rows)
    assert nll < np.log(17)
    assert f"held-out NLL {nll:.4f} nats per code" in said
    drawn = load_decoder(tmp_path / "out" / "model", model.config, None, torch.device("cpu"))
    assert drawn is not None
    picture = drawn.pictures(torch.tensor([[0, 16] * 32]))
    assert (picture[0, :, 0, 0].tolist(), picture[0, :, 0, 1].tolist()) == ([255, 255, 255], [0, 0, 0])
