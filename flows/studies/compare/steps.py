"""What a comparison is made of: its rows, what all methods share, and one method."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from numprune import sensitivity
from numprune.choosing import Known
from numprune.corpus import rows_digest, sample_rows
from numprune.documents import Reading
from numprune.export.checkpoint import load, load_tokenizer
from numprune.flows.steps.baseline import score, scored, side
from numprune.flows.steps.evaluate import finite
from numprune.flows.steps.text import calibration_rows, load_heldout, save_heldout, text_rows
from numprune.flows.studies.compare.meter import Meter
from numprune.flows.studies.compare.methods import options_of
from numprune.flows.studies.rivals import RIVALS
from numprune.layers import ModelLayers
from numprune.moments import Moments
from numprune.pruning import dense_moments, prune
from numprune.quality import compare_with
from numprune.sensitivity import Sensitivity
from numprune.target import Target
from numprune.tasks import CAUSAL

T = TypeVar("T")

BATCH_SIZE = 8
_ROWS = "calibration.safetensors"


def make_text(
    out: Path,
    *,
    model: Path,
    text: str | list[str],
    heldout: str | list[str] | None,
    samples: list[int],
    sequence_length: int,
    seed: int,
    reading: dict[str, Any],
) -> dict[str, Any]:
    """Stage: calibration rows of each size, and held-out rows; without `heldout`, the last fifth of the windows."""
    tokenizer, how = load_tokenizer(model), Reading(**reading)
    if heldout is None:
        windows = text_rows(text, "train", tokenizer, sequence_length, how)
        cut = len(windows.rows) * 4 // 5
        judged = windows.part(slice(cut, None))
        draws = {n: sample_rows(windows.part(slice(cut)), n, sequence_length, seed) for n in samples}
    else:
        judged = text_rows(heldout, "heldout", tokenizer, sequence_length, how)
        draws = {n: calibration_rows(text, tokenizer, n, sequence_length, seed, how)[0] for n in samples}
    save_file({str(n): rows.contiguous() for n, rows in draws.items()}, out / _ROWS)
    return {
        "heldout": save_heldout(out, judged),
        "calibration": {str(n): {"digest": rows_digest(rows), "tokens": rows.numel()} for n, rows in draws.items()},
    }


def load_rows(text: Path, samples: int) -> Tensor:
    """(samples, S) calibration rows of the stage `text`."""
    with safe_open(text / _ROWS, "pt") as file:
        return file.get_tensor(str(samples))


def make_reference(out: Path, *, model: Path, text: Path, heldout: str, device: str) -> dict[str, Any]:
    """Stage: the dense model on the held-out rows."""
    loaded, tokenizer = load(model)
    return score(out, loaded.to(device), tokenizer, load_heldout(text, heldout))


def make_moments(out: Path, *, model: Path, text: Path, samples: int, device: str) -> dict[str, Any]:
    """Stage: the calibration pass that methods share: the moments of every block of the dense model, a file each."""
    meter = Meter(torch.device(device))
    loaded = load(model)[0].to(device)
    meter.start()
    for name, moments in dense_moments(ModelLayers(loaded), load_rows(text, samples), BATCH_SIZE):
        save_file(moments.tensors(), out / f"{name}.safetensors")
    seconds, peak_bytes = meter.stop()
    return {"seconds": seconds, "peak_bytes": peak_bytes}


def make_gradients(out: Path, *, model: Path, text: Path, samples: int, device: str, taylor: bool) -> dict[str, Any]:
    """Stage: the backward pass that methods share: every block's sensitivity, a file each."""
    meter = Meter(torch.device(device))
    loaded = load(model)[0].to(device)
    meter.start()
    found = sensitivity.measure(ModelLayers(loaded), load_rows(text, samples), BATCH_SIZE, taylor=taylor)
    seconds, peak_bytes = meter.stop()
    for name, output in found.output.items():
        scores = {"taylor": found.taylor[name]} if name in found.taylor else {}
        save_file({"output": output, **scores}, out / f"{name}.safetensors")
    return {"seconds": seconds, "peak_bytes": peak_bytes}


class Stored(Mapping[str, T]):
    """What a stage wrote of every block, a file each, read block by block.

    Args:
        folder: of the stage.
        restore: makes a value of a file's tensors.
    """

    def __init__(self, folder: Path, restore: Callable[[dict[str, Tensor]], T]) -> None:
        self._files = {path.stem: path for path in folder.glob("*.safetensors")}
        self._restore = restore

    def __getitem__(self, block: str) -> T:
        return self._restore(load_file(self._files[block]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _known(moments: Path | None, gradients: Path | None, device: torch.device) -> Known:
    """What was collected of the dense model. Raises KeyError where something is read that was not."""
    found: Mapping[str, Moments] = {}
    if moments:
        found = Stored(moments, lambda tensors: Moments.restored(tensors, device))
    if not gradients:
        return Known(found)
    output = Stored(gradients, lambda tensors: tensors["output"].to(device))
    taylor = Stored(gradients, lambda tensors: tensors["taylor"].to(device))
    return Known(found, Sensitivity(output, taylor))


def make_method(
    out: Path,
    *,
    model: Path,
    text: Path,
    heldout: str,
    reference: Path,
    moments: Path | None,
    gradients: Path | None,
    shared: list[dict[str, Any]],
    method: str,
    ratio: float,
    samples: int,
    align: int,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Stage: one method's figures; nothing is kept of the model that it makes.

    Seconds and memory are those of the method as if it were alone: those of the passes that it shares with others,
    `shared`, count with it.
    """
    meter = Meter(torch.device(device))
    loaded = load(model)[0].to(device)
    dense = CAUSAL.predictions(loaded)
    dense_head, vocabulary = dense.head, dense.size
    del dense  # it holds the model
    rows = load_rows(text, samples)
    known = _known(moments, gradients, torch.device(device))
    meter.start()
    small, sizes = _reduce(loaded, rows, method, ratio, Target(align), seed, known)
    seconds, peak_bytes = meter.stop()
    judged = load_heldout(text, heldout)
    found = compare_with(small, scored(reference, judged, dense_head, vocabulary, torch.device(device)), judged)
    increase = found.loss_delta
    return finite(
        {
            "nll_increase": increase.value,
            "ci95_lower": increase.ci95_lower,
            "ci95_upper": increase.ci95_upper,
            "sampling_unit": increase.sampling_unit,
            **side(found.candidate),
            **found.metrics,
            **sizes,
            "seconds": seconds + sum(part["seconds"] for part in shared),
            "peak_bytes": max(peak_bytes, *(part["peak_bytes"] for part in shared), 0),
        }
    )


def _reduce(
    model: PreTrainedModel,
    rows: Tensor,
    method: str,
    ratio: float,
    target: Target,
    seed: int,
    known: Known,
) -> tuple[nn.Module, dict[str, Any]]:
    """The smaller model, and how small it is."""
    if method in RIVALS:
        made = RIVALS[method](model, rows, ratio, BATCH_SIZE)
        return made.model, {"parameters": made.parameters, "prunable_ratio_removed": made.prunable_ratio_removed}
    pruned = prune(model, rows, options_of(method, ratio, target, seed), known)
    removed = pruned.prunable_ratio_removed
    return pruned.model, {"parameters": pruned.after.parameters, "prunable_ratio_removed": removed}
