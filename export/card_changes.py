"""Changes of later steps to the model card written by card.py: precision, quantization, training, quality."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.dtypes import name_of
from numprune.errors import IntegrityError
from numprune.export.config import read_config
from numprune.export.files import CARD
from numprune.plans import PLAN_FILE
from numprune.quantization.compressed_tensors import QuantizationConfig

QUALITY = "## Quality\n"
USE = "## Use\n\n"
PRECISION = "stored in"
TRAINING = "training after pruning"
KV = "KV cache per token"
UNMEASURED = """\
Not measured yet. `numprune evaluate . --baseline BASE --text FILE` compares it with its base on your own text.
"""


def row(key: str, value: str) -> str:
    """Return a row of the card's table."""
    return f"| {key} | {value} |"


def with_quality(card: str, quality: str) -> str:
    """Return the card with its quality section replaced by `quality`, Markdown that begins with the same heading.

    Raises IntegrityError if the card has no such section.
    """
    before, found, after = card.partition(QUALITY)
    _, following, rest = after.partition("\n## ")
    if not found or not following:
        raise IntegrityError(f"{CARD}: not a card written by numprune: section {QUALITY.strip()!r} is missing")
    return f"{before}{quality.strip()}\n{following}{rest}"


def set_precision(folder: Path) -> None:
    """Update the stored precision in a numprune card, if the checkpoint has one."""
    path = folder / CARD
    if not (folder / PLAN_FILE).is_file() or not path.is_file():
        return
    config = read_config(folder)
    kv_bytes = budget_of(read_anatomy(config)).kv_bytes_per_token
    text = path.read_text(encoding="utf-8")
    text = re.sub(rf"^\| {PRECISION} \| .* \|$", row(PRECISION, name_of(config.dtype)), text, flags=re.M)
    text = re.sub(rf"^(\| {KV} \| .* →) [\d,]+ bytes \|$", rf"\1 {kv_bytes:,} bytes |", text, flags=re.M)
    path.write_text(_unmeasured(text), encoding="utf-8")


def set_quantization(folder: Path, found: QuantizationConfig, lm_head_bits: int) -> None:
    """State in a numprune card, if the checkpoint has one, how the weights and the output matrix were quantized."""
    path = folder / CARD
    if not path.is_file():
        return
    head = "; values of the output matrix rounded to 4 bits" if lm_head_bits == 4 else ""
    added = row("quantization", f"weights of the layers: {found}, in the format compressed-tensors{head}")
    text = path.read_text(encoding="utf-8")
    text, rows = re.subn(rf"^\| {PRECISION} \| .* \|$", rf"\g<0>\n{added}", text, flags=re.M)
    if rows:  # another tool's card has none
        text = text.replace(
            USE, f"{USE}For the quantized weights, transformers needs `pip install compressed-tensors`. ", 1
        )
    path.write_text(_unmeasured(text), encoding="utf-8")


def set_training(folder: Path, training: str) -> None:
    """State in a numprune card, if the checkpoint has one, how the model was trained after pruning."""
    path = folder / CARD
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    text = re.sub(rf"^\| {TRAINING} \| .* \|$", row(TRAINING, training), text, flags=re.M)
    path.write_text(_unmeasured(text), encoding="utf-8")


def distilled(recovery: Mapping[str, Any]) -> str:
    """Return the card's sentence on a training; `recovery` is the manifest's section."""
    kept = f"the weights after step {recovery['best_step']} of {recovery['steps']}"
    if not recovery["best_step"]:
        kept = "no step improved on the pruned weights, which were kept"
    return f"distillation from the base model on {recovery['tokens']:,} tokens; {kept}"


def _unmeasured(card: str) -> str:
    """Reset the card's quality section: it describes other weights than the present ones."""
    return re.sub(rf"^{QUALITY}.*?(?=^## |\Z)", f"{QUALITY}\n{UNMEASURED}\n", card, flags=re.M | re.S)
