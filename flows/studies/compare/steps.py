"""The stages of a comparison: its rows, the work shared by all methods, and one method."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
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
from numprune.errors import InputError
from numprune.export.checkpoint import load_model, text_tokenizer
from numprune.export.tasks import load_task
from numprune.flows.stages import Artifact, Text, read_facts
from numprune.flows.steps.baseline import score, scored
from numprune.flows.steps.evaluate import finite
from numprune.flows.steps.results import BaselineScores, HeldoutRows
from numprune.flows.steps.text import calibration_rows, load_heldout, save_heldout, text_rows
from numprune.flows.studies.compare.meter import Meter
from numprune.flows.studies.compare.methods import options_of
from numprune.flows.studies.compare.table import Row
from numprune.flows.studies.rivals import RIVALS
from numprune.layers import ModelLayers, named_inputs
from numprune.moments import Moments
from numprune.pruning import dense_moments, prune
from numprune.quality import compare_with
from numprune.sensitivity import Sensitivity
from numprune.target import Target
from numprune.tasks import Task

T = TypeVar("T")

BATCH_SIZE = 8
_ROWS = "calibration.safetensors"


@dataclass(frozen=True)
class DrawnRows:
    """`digest`: of the tokens."""

    digest: str
    tokens: int


@dataclass(frozen=True)
class ComparedText:
    """`calibration`: by the number of rows."""

    heldout: HeldoutRows
    calibration: dict[int, DrawnRows]


@dataclass(frozen=True)
class SharedPass:
    """The cost of a shared pass over the dense model."""

    seconds: float
    peak_bytes: int


def make_text(
    out: Path,
    *,
    model: Artifact,
    text: Text,
    heldout: Text | None,
    samples: list[int],
    sequence_length: int,
    seed: int,
    reading: Reading,
) -> ComparedText:
    """Draw calibration rows of each size, and held-out rows; without `heldout`, the last fifth of the windows.

    Raises InputError: held-out images have no labels.
    """
    tokenizer, task, source = text_tokenizer(model.path), load_task(model.path), text.source
    if heldout is None:
        windows = text_rows(source, "train", tokenizer, sequence_length, reading, task=task)
        cut = len(windows.rows) * 4 // 5
        judged = windows.part(slice(cut, None))
        draws = {n: sample_rows(windows.part(slice(cut)), n, sequence_length, seed) for n in samples}
    else:
        judged = text_rows(heldout.source, "heldout", tokenizer, sequence_length, reading, task=task)
        if not task.has_loss(judged):
            raise InputError("--heldout: images need labels to be compared by; put each class into a subfolder")
        draws = {
            n: calibration_rows(source, tokenizer, n, sequence_length, seed, reading, task=task)[0] for n in samples
        }
    save_file({str(n): rows.contiguous() for n, rows in draws.items()}, out / _ROWS)
    drawn = {n: DrawnRows(rows_digest(rows), rows.numel()) for n, rows in draws.items()}
    return ComparedText(save_heldout(out, judged, task), drawn)


def load_rows(text: Path, samples: int) -> Tensor:
    """Return (samples, …) calibration rows of the stage `text`."""
    with safe_open(text / _ROWS, "pt") as file:
        return file.get_tensor(str(samples))


def make_reference(out: Path, *, model: Artifact, heldout: Artifact, device: str) -> BaselineScores:
    """Score the dense model on the held-out rows."""
    loaded, judged = load_model(model.path).to(device), load_heldout(heldout.path, heldout.digest)
    return score(out, loaded, text_tokenizer(model.path), judged, task=load_task(model.path))


def make_moments(out: Path, *, model: Artifact, rows: Artifact, samples: int, device: str) -> SharedPass:
    """Run the calibration shared by all methods: write the moments of every block of the dense model, a file each."""
    meter = Meter(torch.device(device))
    layers = ModelLayers(load_model(model.path).to(device), load_task(model.path))
    meter.start()
    for name, moments in dense_moments(layers, load_rows(rows.path, samples), BATCH_SIZE):
        save_file(moments.tensors(), out / f"{name}.safetensors")
    return SharedPass(*meter.stop())


def make_gradients(
    out: Path, *, model: Artifact, rows: Artifact, samples: int, device: str, taylor: bool
) -> SharedPass:
    """Run the backward pass shared by all methods: write every block's sensitivity, a file each."""
    meter = Meter(torch.device(device))
    layers = ModelLayers(load_model(model.path).to(device), load_task(model.path))
    meter.start()
    found = sensitivity.measure(layers, load_rows(rows.path, samples), BATCH_SIZE, taylor=taylor)
    seconds, peak_bytes = meter.stop()
    for name, output in found.output.items():
        scores = {"taylor": found.taylor[name]} if name in found.taylor else {}
        save_file({"output": output, **scores}, out / f"{name}.safetensors")
    return SharedPass(seconds, peak_bytes)


class Stored(Mapping[str, T]):
    """The output of a stage with one file per block, read block by block.

    Args:
        folder: of the stage.
        restore: converts a file's tensors to a value.
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


def _known(moments: Artifact | None, gradients: Artifact | None, device: torch.device) -> Known:
    """Return the data collected from the dense model. Reading anything else raises KeyError."""
    found: Mapping[str, Moments] = {}
    if moments:
        found = Stored(moments.path, lambda tensors: Moments.restored(tensors, device))
    if not gradients:
        return Known(found)
    output = Stored(gradients.path, lambda tensors: tensors["output"].to(device))
    taylor = Stored(gradients.path, lambda tensors: tensors["taylor"].to(device))
    return Known(found, Sensitivity(output, taylor))


def make_method(
    out: Path,
    *,
    model: Artifact,
    rows: Artifact,
    heldout: Artifact,
    reference: Artifact,
    moments: Artifact | None,
    gradients: Artifact | None,
    method: str,
    ratio: float,
    samples: int,
    align: int,
    axes: list[str],
    seed: int,
    device: str,
) -> Row:
    """Return one method's figures; its pruned model is discarded.

    Seconds and memory are those of the method alone: the passes shared with others, `moments` and `gradients`, are
    included.
    """
    shared = [read_facts(stage.path, SharedPass) for stage in (moments, gradients) if stage]
    meter = Meter(torch.device(device))
    loaded, task = load_model(model.path).to(device), load_task(model.path)
    dense = task.predictions(loaded)
    dense_head, size = dense.head, dense.size
    del dense  # it holds the model
    tokens = load_rows(rows.path, samples)
    known = _known(moments, gradients, torch.device(device))
    forward_seconds = _forward_seconds(loaded, tokens, meter)
    meter.start()
    small, sizes = _reduce(loaded, tokens, method, ratio, Target(align), axes, seed, known, task)
    seconds, peak_bytes = meter.stop()
    judged = load_heldout(heldout.path, heldout.digest)
    dense = scored(reference.path, judged, dense_head, size, torch.device(device), task)
    found = compare_with(small, dense, judged, task)
    increase, own = found.loss_delta, found.candidate
    assert own is not None  # the rows have labels if they are images
    kl = next(value for name, value in found.metrics.items() if name.startswith("kl_"))
    seconds += sum(part.seconds for part in shared)
    figures = finite(
        {
            "nll_increase": increase.value,
            "ci95_lower": increase.ci95_lower,
            "ci95_upper": increase.ci95_upper,
            "sampling_unit": increase.sampling_unit,
            "nll": own.mean_nll,
            "perplexity": None if own.accuracy is not None else own.perplexity,
            "accuracy": own.accuracy,
            "kl": kl,
            "top1_agreement": found.metrics["top1_agreement"],
            **sizes,
            "seconds": seconds,
            "forward_passes": seconds / forward_seconds,
            "peak_bytes": max(peak_bytes, *(part.peak_bytes for part in shared), 0),
        }
    )
    return Row(ratio=ratio, samples=samples, method=method, **figures)


@torch.no_grad()
def _forward_seconds(model: PreTrainedModel, rows: Tensor, meter: Meter) -> float:
    """Return the seconds of one pass of the model without its head over the rows, the median of three."""
    taken = []
    for _ in range(3):
        meter.start()
        for batch in rows.split(BATCH_SIZE):
            model.base_model(**named_inputs(model, batch.to(model.device)))
        taken.append(meter.stop()[0])
    return median(taken)


def _reduce(
    model: PreTrainedModel,
    rows: Tensor,
    method: str,
    ratio: float,
    target: Target,
    axes: list[str],
    seed: int,
    known: Known,
    task: Task,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the smaller model and its size."""
    if method in RIVALS:
        made = RIVALS[method](model, rows, ratio, BATCH_SIZE)
        return made.model, {"parameters": made.parameters, "prunable_ratio_removed": made.prunable_ratio_removed}
    pruned = prune(model, rows, options_of(method, ratio, target, seed, axes), known, task)
    removed = pruned.prunable_ratio_removed
    return pruned.model, {"parameters": pruned.after.parameters, "prunable_ratio_removed": removed}
