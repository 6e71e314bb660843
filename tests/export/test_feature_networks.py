"""Networks for FID: TorchScript and ONNX, one or two outputs, and what is refused."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from numprune.errors import InputError, IntegrityError
from numprune.export.feature_networks import features_of, load_network

CPU = torch.device("cpu")
SIDE, FEATURES, CLASSES = 4, 5, 3
IMAGES = torch.randint(256, (70, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classes = nn.Linear(3 * SIDE * SIDE, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.features(images.flatten(1).float() / 255)
        return found, self.classes(found)


class OnlyFeatures(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.flatten(1).float() / 255)


class LikeInception(Linear):
    """The calls of the published translation of the Inception network."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        found = self.features(img.flatten(1).float() / 255)
        if return_features:
            return found
        logits = self.classes(found)
        return (logits - self.classes.bias if no_output_bias else logits).softmax(1)


def scripted(network: nn.Module, file: Path) -> Path:
    torch.jit.script(network).save(str(file))
    return file


def onnx_file(file: Path, kind: int = TensorProto.UINT8, *, classes: bool = True) -> Path:
    """The network `Linear`, on images of uint8 or float."""
    network = Linear()
    weights = {
        "scale": torch.tensor(255.0),
        "w": network.features.weight.T,
        "b": network.features.bias,
        "v": network.classes.weight.T,
        "c": network.classes.bias,
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "scale"], ["scaled"]),
        helper.make_node("Gemm", ["scaled", "w", "b"], ["features"]),
        helper.make_node("Gemm", ["features", "v", "c"], ["logits"]),
    ]
    outputs = [("features", FEATURES), ("logits", CLASSES)][: 2 if classes else 1]
    graph = helper.make_graph(
        nodes[: 5 if classes else 4],
        "network",
        [helper.make_tensor_value_info("images", kind, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in outputs],
        [numpy_helper.from_array(value.detach().contiguous().numpy(), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features, logits = Linear()(IMAGES)
    return features, logits.softmax(1)


@pytest.mark.parametrize("kind", ["torchscript", "uint8", "float"])
def test_features_and_classes(tmp_path: Path, kind: str, expected: tuple[Tensor, Tensor]) -> None:
    if kind == "torchscript":
        file = scripted(Linear(), tmp_path / "network.pt")
    else:
        file = onnx_file(tmp_path / "network.onnx", TensorProto.UINT8 if kind == "uint8" else TensorProto.FLOAT)
    found = features_of(load_network(file, CPU), IMAGES)
    torch.testing.assert_close(found.features, expected[0])
    torch.testing.assert_close(found.probabilities, expected[1])


def test_features_alone(tmp_path: Path, expected: tuple[Tensor, Tensor]) -> None:
    for file in (scripted(OnlyFeatures(), tmp_path / "n.pt"), onnx_file(tmp_path / "n.onnx", classes=False)):
        found = features_of(load_network(file, CPU), IMAGES)
        torch.testing.assert_close(found.features, expected[0])
        assert found.probabilities is None


def test_the_published_inception_network_is_called_as_its_authors_do(
    tmp_path: Path, expected: tuple[Tensor, Tensor]
) -> None:
    found = features_of(load_network(scripted(LikeInception(), tmp_path / "inception.pt"), CPU), IMAGES)
    torch.testing.assert_close(found.features, expected[0])
    with torch.no_grad():
        without_bias = (expected[0] @ Linear().classes.weight.T).softmax(1)
    torch.testing.assert_close(found.probabilities, without_bias)


class Three(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images, images, images


class Whole(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Unnormalized(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.flatten(1).float()


class Infinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 0


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (Three(), InputError, "must return features (n, D), or features and logits of classes (n, C)"),
        (
            Whole(),
            InputError,
            "the network's features of 2 images have shape [2, 3, 4, 4]; they must be a row for each",
        ),
        (Unnormalized(), InputError, "the network's probabilities of classes do not sum to 1 for each image"),
        (Infinite(), IntegrityError, "the network's features are not finite; its weights are damaged"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, network: Any, error: type[Exception], message: str) -> None:
    loaded = load_network(scripted(network, tmp_path / "n.pt"), CPU)
    with pytest.raises(error, match=re.escape(message)):
        features_of(loaded, IMAGES[:2])


def test_other_files_and_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        load_network(tmp_path / "gone.pt", CPU)
    for name in ("n.pt", "n.onnx"):
        (tmp_path / name).write_bytes(b"no network")
        with pytest.raises(InputError, match=rf"{name}: not an? "):
            load_network(tmp_path / name, CPU)
    with pytest.raises(
        InputError, match=r"its inputs are images tensor\(double\); it must have one, of uint8 or float"
    ):
        load_network(onnx_file(tmp_path / "d.onnx", TensorProto.DOUBLE), CPU)
    for file in (scripted(Linear(), tmp_path / "s.pt"), onnx_file(tmp_path / "s.onnx")):
        with pytest.raises(InputError, match=r"cannot take images \[2, 3, 5, 5\]"):
            features_of(load_network(file, CPU), torch.zeros(2, 3, 5, 5, dtype=torch.uint8))
