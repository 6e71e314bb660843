"""Train a small ViT or Swin on scikit-learn's handwritten digits, and write it with its images.

    python -m numprune.flows.embedded.digits examples/digits
    numprune optimize examples/digits-vit.toml

    python -m numprune.flows.embedded.digits examples/digits-swin --architecture swin
    numprune optimize examples/digits-swin.toml

examples/digits/model is a checkpoint; train and heldout beside it have a subfolder of PNG files for each digit. The
digits (1,797 real images of 8 x 8 grey levels) come with scikit-learn, so nothing is downloaded. Training takes half a
minute on one CPU core. It uses one thread: the same seed and versions give the same weights on any number of cores.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from numprune.errors import InputError
from numprune.flows.embedded.threads import one_thread

_HELDOUT = 500  # images, never trained on
_LEVELS = 16  # of grey, from 0
_BATCH, _RATE = 32, 2e-3


def load_digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 8, 8) uint8 and their digits (N,), in an order drawn with `seed`. Raises InputError."""
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError('the digits come with scikit-learn: pip install "numprune[vision]"') from None
    found = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    return np.round(found.images[order] * (255 / _LEVELS)).astype(np.uint8), found.target[order]


def processor() -> Any:
    """Return the model's image processor."""
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


_NAMES = {digit: str(digit) for digit in range(10)}
_IMAGES: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 1,
    "initializer_range": 0.1,  # for so small a width
    "id2label": _NAMES,
    "label2id": {name: digit for digit, name in _NAMES.items()},
}


def build_vit(hidden_size: int = 64, layers: int = 4) -> PreTrainedModel:
    """Return an untrained ViT with heads of 16, four times as many MLP channels, and patches of 2 x 2."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 16,
            intermediate_size=4 * hidden_size,
            patch_size=2,
            **_IMAGES,
        )
    )


def build_swin() -> PreTrainedModel:
    """Return an untrained Swin with heads of 16 and patches of 2 x 2, in two stages with windows of 2 x 2 tokens."""
    return SwinForImageClassification(
        SwinConfig(embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=2, patch_size=2, **_IMAGES)
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {"vit": build_vit, "swin": build_swin}


def pixels(images: np.ndarray) -> Tensor:
    """Return what `processor` makes of images (N, 8, 8) uint8: (N, 1, 8, 8) in [-1, 1]."""
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1


@one_thread()
def train(model: PreTrainedModel, images: Tensor, digits: Tensor, epochs: int, seed: int) -> None:
    """Train with AdamW; its rate rises for a tenth of the steps and then falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images[chosen]).logits, digits[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 5) == 0:
            print(f"step {step + 1}/{steps}, loss {float(loss.detach()):.3f}", file=sys.stderr)
    model.eval()


@torch.inference_mode()
def accuracy(model: PreTrainedModel, images: Tensor, digits: Tensor) -> float:
    """Return the share of images whose most probable class is their digit."""
    return float((model(pixel_values=images).logits.argmax(-1) == digits).double().mean())


def write_images(folder: Path, images: np.ndarray, digits: np.ndarray) -> None:
    """Write each image as a PNG file into the subfolder of its digit."""
    for number, (image, digit) in enumerate(zip(images, digits, strict=True)):
        inside = folder / str(digit)
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(inside / f"{number:04}.png")


def write(folder: Path, architecture: str, epochs: int, seed: int) -> None:
    """Train, and write the model and its images into an empty folder. Raises InputError."""
    images, digits = load_digits(seed)
    parts = {"heldout": slice(_HELDOUT), "train": slice(_HELDOUT, None)}
    for name, part in parts.items():
        write_images(folder / name, images[part], digits[part])
    torch.manual_seed(seed)
    model, labels = ARCHITECTURES[architecture](), torch.from_numpy(digits)
    train(model, pixels(images[parts["train"]]), labels[parts["train"]], epochs, seed)
    model.save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    right = accuracy(model, pixels(images[parts["heldout"]]), labels[parts["heldout"]])
    print(f"top-1 {right:.1%} on {_HELDOUT} held-out images", file=sys.stderr)


def main() -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write (must not exist)")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="vit", help="default: vit")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise InputError(f"{args.out}: already exists; choose another folder or remove it")
        if args.epochs < 1 or args.seed < 0:
            raise InputError(f"--epochs {args.epochs}, --seed {args.seed}: they must be at least 1 and 0")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # Interrupted, it leaves no folder that looks complete.
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=args.out.parent) as scratch:
            made = Path(scratch, "digits")
            made.mkdir()
            write(made, args.architecture, args.epochs, args.seed)
            made.rename(args.out)
    except InputError as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
