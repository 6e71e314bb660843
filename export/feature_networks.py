"""Networks of the user's own that turn images into features, for FID and the Inception Score: TorchScript and ONNX."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from numprune.errors import InputError, IntegrityError, reason

_BATCH = 32
_ROUNDING = 1e-3  # of a sum of probabilities


@dataclass(frozen=True)
class Features:
    """What a network says of n images.

    Attributes:
        features: (n, D) float32.
        probabilities: (n, C) float32, of its classes; None: it has none.
    """

    features: Tensor
    probabilities: Tensor | None


class Network(Protocol):
    """Takes images (n, 3, H, W) uint8."""

    def __call__(self, images: Tensor) -> Features: ...


def load_network(path: Path, device: torch.device) -> Network:
    """Open a network's file.

    A .onnx file has one input, images (n, 3, H, W) of uint8 or float32 from 0 to 255, and one or two outputs: features
    (n, D), and logits of classes (n, C). Any other file is TorchScript. It is called with uint8 and returns the same
    one or two tensors; or, if its `forward` has the argument `return_features`, as the translation of the original
    Inception network that StyleGAN's authors publish, features where that is true, and probabilities where it is not.

    Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _Onnx(path, device) if path.suffix.lower() == ".onnx" else _TorchScript(path, device)


def features_of(network: Network, images: Tensor) -> Features:
    """Return the features of images (n, 3, H, W) uint8, in batches. Raises InputError, IntegrityError."""
    found = [_checked(network(batch), len(batch)) for batch in images.split(_BATCH)]
    probabilities = [batch.probabilities for batch in found if batch.probabilities is not None]
    return Features(torch.cat([batch.features for batch in found]), torch.cat(probabilities) if probabilities else None)


def _checked(found: Features, images: int) -> Features:
    for name, values in (("features", found.features), ("classes", found.probabilities)):
        if values is None:
            continue
        if values.ndim != 2 or len(values) != images or not values.shape[1]:
            raise InputError(
                f"the network's {name} of {images} images have shape {list(values.shape)}; they must be a row for each"
            )
        if not torch.isfinite(values).all():
            raise IntegrityError(f"the network's {name} are not finite; its weights are damaged")
    if found.probabilities is not None:
        sums = found.probabilities.sum(1)
        if float(found.probabilities.min()) < 0 or float((sums - 1).abs().max()) > _ROUNDING:
            raise InputError("the network's probabilities of classes do not sum to 1 for each image")
    return found


def _of_outputs(outputs: Any) -> Features:
    """Features, or features and logits."""
    given = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if not 1 <= len(given) <= 2 or not all(isinstance(one, Tensor) for one in given):
        raise InputError("the network must return features (n, D), or features and logits of classes (n, C)")
    features, *logits = (one.detach().float().cpu() for one in given)
    return Features(features, logits[0].softmax(-1) if logits else None)


class _TorchScript:
    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            with warnings.catch_warnings():  # TorchScript is deprecated, but the field's networks are files of it
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(str(path), map_location=device).eval()
            arguments = {argument.name for argument in self._module.forward.schema.arguments}
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise InputError(f"{path}: not a TorchScript network: {reason(error)}; give one, or a .onnx file") from None
        self._path, self._device = path, device
        self._published = "return_features" in arguments
        # The published score leaves out the bias of the last layer.
        self._of_classes = {"no_output_bias": True} if "no_output_bias" in arguments else {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        images = images.to(self._device)
        try:
            if not self._published:
                return _of_outputs(self._module(images))
            features = self._module(images, return_features=True)
            return Features(features.float().cpu(), self._module(images, **self._of_classes).float().cpu())
        except RuntimeError as error:
            raise InputError(f"{self._path}: cannot take images {list(images.shape)}: {reason(error)}") from None


class _Onnx:
    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise InputError(f'{path}: needs onnxruntime ({error}): pip install "numprune[cpu]"') from None
        available = ort.get_available_providers()
        cuda = ["CUDAExecutionProvider"] if device.type == "cuda" and "CUDAExecutionProvider" in available else []
        try:
            self._session = ort.InferenceSession(str(path), providers=[*cuda, "CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes derive from Exception
            raise InputError(f"{path}: not an ONNX network that ONNX Runtime can run: {reason(error)}") from None
        inputs = self._session.get_inputs()
        kinds = {"tensor(uint8)": torch.uint8, "tensor(float)": torch.float32}
        if len(inputs) != 1 or inputs[0].type not in kinds:
            given = ", ".join(f"{one.name} {one.type}" for one in inputs)
            raise InputError(f"{path}: its inputs are {given}; it must have one, of uint8 or float")
        self._path, self._name, self._dtype = path, inputs[0].name, kinds[inputs[0].type]

    def __call__(self, images: Tensor) -> Features:
        try:
            outputs = self._session.run(None, {self._name: images.to(self._dtype).numpy()})
        except Exception as error:
            raise InputError(f"{self._path}: cannot take images {list(images.shape)}: {reason(error)}") from None
        return _of_outputs([torch.from_numpy(output) for output in outputs])
