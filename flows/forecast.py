"""Forecast of a run: sizes, text, stages, memory, and the servers' requirements."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from numprune.anatomy import read_anatomy
from numprune.axes import HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.budget import budget_of, kv_bytes
from numprune.counted import counted
from numprune.export import checkpoint, precision
from numprune.export.tasks import load_task
from numprune.flows import runs, stages
from numprune.flows.chain import judge
from numprune.flows.names import ROOFLINE
from numprune.flows.recipe import Recipe
from numprune.flows.run import Run
from numprune.flows.stages import Stage, StageResult
from numprune.flows.steps.checks.pruning import pruning_options
from numprune.flows.steps.checks.quantization import schemes_asked
from numprune.flows.steps.learn import request_of
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.text import draw_rows, named, read_images, text_rows
from numprune.images import draw_pictures
from numprune.inputs import FROM_PRUNED_PREFIX
from numprune.option_checks import beside_windows, known_results
from numprune.options import PruneOptions, left_of
from numprune.quantization import bytes_saved
from numprune.recovery.options import COPIES
from numprune.serving.report.words import COUNTED
from numprune.spans import full_layers
from numprune.tasks.codes import ImageCodes
from numprune.tasks.image_classification import ImageClassification

R = TypeVar("R")

_FLOAT32, _FLOAT64 = 4, 8


def forecast(recipe: Recipe, workspace: Path) -> dict[str, Any]:
    """Return what is known about a run before it starts, as plain JSON. Nothing is written.

    Raises InputError with every problem of the recipe, or if the text is too short.
    """
    run = prepare(recipe, workspace)
    config = checkpoint.read_config(run.base.path)
    anatomy, stored = read_anatomy(config), config.dtype
    text = _text(run)
    options = pruning_options(recipe, run.base.path)
    masks = recipe.learn.method != "none"
    narrows = HIDDEN_SIZE in options.axes  # to a size that only training finds
    counts = request_of(recipe.learn, options).constraint if masks else "parameters"
    # Masks price the splits of uniform whether or not anything is refitted.
    joint = dataclasses.replace(options, compensation="joint") if masks else options
    # Masks that count FLOPs or the KV cache give each layer its own size.
    results = [] if narrows or counts in ("flops", "kv-bytes") else known_results(anatomy, joint, planned=masks)
    unknown = recipe.prune.allowed.time or counts == "flops"
    weights = cast = checkpoint.weight_bytes(run.base.path)
    schemes, exported = schemes_asked(recipe.quantize), anatomy
    if "vllm" in recipe.export.targets and recipe.export.dtype != precision.AUTO:
        bytes_per_value = precision.DTYPES[recipe.export.dtype].itemsize
        results = [dataclasses.replace(result, bytes_per_value=bytes_per_value) for result in results]
        exported = dataclasses.replace(anatomy, bytes_per_value=bytes_per_value)
        cast = weights * bytes_per_value // anatomy.bytes_per_value

    def saved(left: Anatomy) -> int:
        return bytes_saved(left, schemes[0], stored) if len(schemes) == 1 else 0  # of several a budget chooses

    return {
        "recipe": recipe.digest,
        "model": str(run.base.path),
        "ratio": recipe.prune.ratio,
        "ratio_counts": counts,
        "budget_bytes": options.budget.limit if options.budget else None,
        "budget_time": recipe.prune.allowed.time,
        "timed": f"estimated for {recipe.timings.peaks().name}, not measured"
        if recipe.timings.runtime == ROOFLINE
        else "measured",
        "timed_as": str(recipe.served()) if recipe.prune.allowed.time else "",
        "budget_kv_bytes": recipe.prune.allowed.kv,
        "drop_layers": options.drop_layers,
        "shapes": len(options.shapes),
        "drop_blocks": recipe.prune.drop_blocks,
        "windows": _windows(anatomy, options, results) if options.window else None,
        "hidden_size": [options.hidden_size, anatomy.hidden_size] if options.hidden_size else None,
        "hidden_size_is_chosen": narrows,
        "refine_minutes": recipe.prune.refine_minutes if recipe.prune.refine != "none" else None,
        "before": {**dataclasses.asdict(budget_of(anatomy)), "weight_bytes": weights},
        "exact": len(results) == 1,
        "quantization": " or ".join(map(str, schemes)) or None,
        "lm_head_bits": recipe.quantize.lm_head_bits if schemes else None,
        "bits_are_chosen": len(schemes) > 1,
        "after": [_after(result, anatomy, cast, saved(result)) for result in results]
        or ([] if unknown else [_aim(exported, options, counts, cast, saved(anatomy))]),
        "text": text,
        "memory": _memory(anatomy, run),
        "serving": _serving(recipe),
        "stages": _stages(run),
    }


def _windows(anatomy: Anatomy, options: PruneOptions, results: Sequence[Anatomy]) -> dict[str, int | bool]:
    """How many layers will see only a window, and the KV cache of a sequence, in the data type of the checkpoint.

    If the sizes are not known yet, it is at most as large as with the windows alone. `results`: the possible ones.
    """
    context = options.sequence_budget.context if options.sequence_budget else anatomy.context
    after, _ = beside_windows(anatomy, options)
    assert options.window is not None
    return {
        "tokens": options.window,
        "layers": len(full_layers(anatomy)) - len(full_layers(after)),
        "context": context,
        "kv_bytes_before": kv_bytes(anatomy, context),
        "kv_bytes_after": max(kv_bytes(result, context, anatomy.bytes_per_value) for result in results or [after]),
        "exact": len(results) == 1,
    }


def _after(result: Anatomy, before: Anatomy, weights: int, saved: int) -> dict[str, Any]:
    """What is left of a model whose sizes are known; `saved`: bytes of its weights, by quantization."""
    budget = budget_of(result)
    sizes = {kind: result.of_kind(kind)[0].units for kind in result.kinds if not result.mergings}  # stages differ
    share = budget.parameters / budget_of(before).parameters
    return {
        **dataclasses.asdict(budget),
        "weight_bytes": round(weights * share) - saved,
        "layers": result.layers,
        "units": sizes,
    }


def _aim(anatomy: Anatomy, options: PruneOptions, counts: str, weights: int, saved: int) -> dict[str, Any]:
    """The target of a ratio or budget if each layer gets its own size.

    `counts`: that of which the ratio is a share; `saved` refers to the whole model.
    """
    if options.budgets:
        return {
            **({"weight_bytes": options.budget.limit} if options.budget else {}),
            **({"kv_bytes_per_token": options.kv_budget.limit} if options.kv_budget else {}),
        }
    before = budget_of(anatomy)
    if counts == "kv-bytes":
        return {"kv_bytes_per_token": round((1 - options.ratio) * before.kv_bytes_per_token)}
    of_width, options = left_of(anatomy, options, ())
    narrow = budget_of(of_width)
    removed = round(options.ratio * narrow.prunable_parameters)
    left = narrow.parameters - removed
    return {
        "parameters": left,
        "prunable_parameters": narrow.prunable_parameters - removed,
        # In stages it depends on the layers that lose parameters.
        **({} if anatomy.mergings else {"flops_per_token": narrow.flops_per_token - 2 * removed}),
        "weight_bytes": round(weights * left / before.parameters - saved * (1 - options.ratio)),
    }


def _text(run: Run) -> dict[str, Any]:
    """The amount of text. Raises InputError if it is too short to calibrate on."""
    data = run.recipe.data
    tokenizer, reading = checkpoint.text_tokenizer(run.base.path), data.reading()
    task = load_task(run.base.path)
    if isinstance(task, ImageClassification):
        calibrated = read_images(data.calibration, reading)
        with named("data.samples"):
            draw_pictures(calibrated, data.samples, data.seed)
        return {
            "samples": data.samples,
            "sequence_length": run.image_tokens,
            "calibration_images": len(calibrated),
            "heldout_images": sum(len(read_images(text, reading)) for text in data.corpora.values()),
        }
    length, tokens = data.sequence_length, data.samples * data.sequence_length
    calibration = text_rows(data.calibration, "train", tokenizer, length, reading, tokens, task)
    draw_rows(calibration, data.samples, length, data.seed, "data.samples")
    heldout = [text_rows(text, "heldout", tokenizer, length, reading, task=task) for text in data.corpora.values()]
    drawn, judged = {"samples": data.samples, "sequence_length": length}, sum(len(rows.rows) for rows in heldout)
    if isinstance(task, ImageCodes):
        return {**drawn, "calibration_images": len(calibration.rows), "heldout_images": judged}
    return {
        **drawn,
        "calibration_windows": sum(len(row) == length for row in calibration.rows),
        "heldout_documents": sum(rows.documents for rows in heldout),
        "heldout_windows": judged,
    }


def _memory(anatomy: Anatomy, run: Run) -> dict[str, int]:
    """The minimum memory for pruning: weights in float32, and the hidden states kept for every token.

    And what training needs beside activations: the dense model, and the pruned one's weights and, if all are trained,
    gradients and moments.

    The states are the dense model's stream and, if the compensation reads the pruned prefix, the pruned model's stream
    and the input of its widest block's consumer.
    """
    prune, data = run.recipe.prune, run.recipe.data
    budget, layers = budget_of(anatomy), anatomy.layers
    weights = budget.parameters
    if prune.stream:
        around, by_layer = anatomy.fixed_parameters, (budget.parameters - anatomy.fixed_parameters) // layers
        weights = around + min(2, layers) * by_layer  # a layer, and the next one, which is read ahead
    row = anatomy.image or (data.sequence_length,)
    per_row = anatomy.largest_stream(row)
    if prune.compensation in FROM_PRUNED_PREFIX:
        per_row += anatomy.largest_stream(row) + anatomy.largest_inputs(row)
    states = data.samples * per_row
    needed = {"weights_float32": weights * _FLOAT32, "hidden_states": states * _FLOAT32}
    if prune.refine != "none":
        needed["refining"] = sum(block.channels**2 for block in anatomy.blocks) * _FLOAT64
    if run.recipe.learn.method != "none":
        copies = 0 if run.recipe.learn.variant == "faster" else COPIES
        needed["learning"] = (1 + copies) * budget.parameters * _FLOAT32
    if run.recipe.recover.method != "none":
        pruned = budget.parameters - round(prune.ratio * budget.prunable_parameters)
        copies = COPIES if run.recipe.recover.train == "all" else 1  # lora and blocks train few of them
        needed["training"] = (budget.parameters + copies * pruned) * _FLOAT32
    return needed


def _serving(recipe: Recipe) -> dict[str, Any]:
    """What vLLM will need for the result, if it is exported for vLLM."""
    if "vllm" not in recipe.export.targets:
        return {}
    return {
        "vllm": recipe.target.vllm,
        "plugin": recipe.prune.allocation != "uniform",
        "tensor_parallel": recipe.target.tensor_parallel,
        "device": recipe.target.device,
    }


# --- stages ---------------------------------------------------------------------------------------


class _Unknown(dict[str, Any]):
    """Stands in for the result of a missing stage. Stages derived from it do not exist either.

    Its digests are those of the stage's inputs with the field's name: they are equal if the real ones would be.
    """

    def __init__(self, inputs: str) -> None:
        super().__init__()
        self.inputs = inputs

    def __getattr__(self, name: str) -> str:
        return f"{name} of {self.inputs}"


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would need; `inputs` is the digest of everything that affects it."""

    name: str
    inputs: str
    reused: bool


def planned(run: Run) -> list[PlannedStage]:
    """Every stage of the run in order."""
    found: list[PlannedStage] = []

    def look_up(stage: Stage[R]) -> StageResult[R]:
        inputs = stages.place_of(run.workspace, stage).digest
        unknown = StageResult(stage.label, run.workspace, inputs, cast(R, _Unknown(inputs)), False, 0.0, 0, 0)
        result = stages.find(run.workspace, stage) or unknown
        found.append(PlannedStage(stage.label, inputs, result.reused))
        return result

    judge(run, look_up)
    return found


def _stages(run: Run) -> list[dict[str, Any]]:
    """Every stage of the run in order: whether it would be reused, and the cost of the last one with its name."""
    before = former(run.workspace)
    return [
        {"name": stage.name, "reused": stage.reused, **({} if stage.reused else before.get(stage.name, {}))}
        for stage in planned(run)
    ]


def former(workspace: Path) -> dict[str, dict[str, Any]]:
    """Time and memory of earlier runs' stages by name: the last one of each that was computed, not reused."""
    taken: dict[str, dict[str, Any]] = {}
    for run in runs.list_runs(workspace):  # newest first
        for stage in run.record.stages if run.record else ():
            if not stage.reused:
                took = {"last_seconds": stage.seconds, "last_peak_memory_bytes": stage.peak_memory_bytes}
                taken.setdefault(stage.name, took)
    return taken


# --- text -----------------------------------------------------------------------------------------

_UNITS = {
    "attention": "KV group per layer",
    "mlp": "MLP channel per layer",
    "experts": "expert per layer",
}


def text(found: Mapping[str, Any]) -> str:
    """The forecast for a terminal."""
    return "\n".join([f"{found['model']}: what a run of this recipe would do", *map("  ".__add__, _lines(found))])


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    before, memory = found["before"], found["memory"]
    several = len(found["after"]) > 1
    kind = "one of these, the cheapest by price" if several else ("exact" if found["exact"] else "the target")
    how = "each block kept or quantized to" if found["bits_are_chosen"] else "then quantized to"
    head = ", the output matrix to 4 bits" if found["lm_head_bits"] == 4 else ""
    then = f", {how} {found['quantization']}{head}" if found["quantization"] else ""
    if found["budget_time"] is not None:
        how = f" ({found['timed_as']})" if found["timed_as"] else ""
        yield f"budget {found['budget_time']}, among sizes that are {found['timed']}{how}"
    limits = [f"budget {found['budget_bytes']:,} bytes"] if found["budget_bytes"] else []
    limits += [f"budget {found['budget_kv_bytes']:,} bytes of KV cache per token"] if found["budget_kv_bytes"] else []
    if not limits and found["budget_time"] is None:
        of = "" if found["ratio_counts"] == "parameters" else f" of the {COUNTED[found['ratio_counts']]}"
        limits = [f"ratio {found['ratio']:g}{of}"]
    if limits:
        yield f"{' and '.join(limits)}{then}, result: {kind}"
    for after in found["after"]:
        yield _size_line(before, after)
    if windows := found["windows"]:
        left = f"{'' if windows['exact'] else 'at most '}{windows['kv_bytes_after']:,} bytes"
        yield (
            f"window: {counted(windows['layers'], 'layer')} will see {windows['tokens']:,} tokens, KV cache at "
            f"{windows['context']:,} tokens {windows['kv_bytes_before']:,} → {left}"
        )
    if found["hidden_size"]:
        yield "hidden size: {1:,} -> {0:,}".format(*found["hidden_size"])
    if found["shapes"]:
        yield f"hidden size and dropped layers: one of {found['shapes']} candidates, up to 4 of which are measured"
    if found["hidden_size_is_chosen"]:
        yield "hidden size: the masks choose it; embeddings and head shrink in addition to the above"
    yield _text_line(found["text"])
    yield (
        f"pruning needs at least {_mib(memory['weights_float32'])} for weights in float32 and "
        f"{_mib(memory['hidden_states'])} for hidden states"
    )
    if found["refine_minutes"] is not None:
        yield (
            f"refining sizes takes at most about {found['refine_minutes']:g} minutes, and needs at least "
            f"{_mib(memory['refining'])} more for Gram matrices"
        )
    if "learning" in memory:
        yield f"learning masks needs at least {_mib(memory['learning'])} for weights, gradients and moments in float32"
    if "training" in memory:
        yield f"training needs at least {_mib(memory['training'])} for weights, gradients and moments in float32"
    if serving := found["serving"]:
        plugin = "with the plug-in numprune-vllm" if serving["plugin"] else "stock"
        where = f"{serving['device']}, tensor_parallel {serving['tensor_parallel']}"
        yield f"serving: vLLM {serving['vllm']}, {plugin}; {where}"
    for stage in found["stages"]:
        yield f"{stage['name']:<28} {_stage_note(stage)}"


def _text_line(text: Mapping[str, Any]) -> str:
    if "calibration_images" in text:
        calibration, heldout = (counted(text[f"{part}_images"], "image") for part in ("calibration", "heldout"))
        return f"calibration: {text['samples']:,} of {calibration}; held out: {heldout}"
    window = f"window of {text['sequence_length']} tokens"
    return (
        f"calibration: {text['samples']:,} of {counted(text['calibration_windows'], window)}; held-out text: "
        f"{counted(text['heldout_windows'], 'window')}, {counted(text['heldout_documents'], 'document')}"
    )


def _size_line(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = {
        "parameters": "parameters",
        "weight_bytes": "weight bytes",
        "flops_per_token": "FLOPs per token",
        "kv_bytes_per_token": "KV bytes per token",
    }
    parts = [f"{what} {before[key]:,} → {after[key]:,}" for key, what in names.items() if key in after]
    units = [counted(count, _UNITS[kind]) for kind, count in after.get("units", {}).items()]
    layers = [counted(after["layers"], "layer")] if "layers" in after else []
    return ", ".join([*layers, *units, *parts])


def _stage_note(stage: Mapping[str, Any]) -> str:
    if stage["reused"]:
        return "reused"
    if "last_seconds" in stage:
        return f"last took {stage['last_seconds']:,.1f} s, peak {_mib(stage['last_peak_memory_bytes'])}"
    return "to be computed"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
