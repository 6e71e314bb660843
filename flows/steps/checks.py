"""Checks of a recipe against files, model and runtimes: everything that can be known before any work."""

import importlib
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from numprune.anatomy import family_of, read_anatomy
from numprune.axes import HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.byte_budget import LEVELS
from numprune.chat import renderer
from numprune.documents import WHOLE_FILE, Document, is_plain, read_documents
from numprune.errors import InputError, NumpruneError
from numprune.export import compressed_tensors, genai, onnx, processors, tensorrt, vllm_pooling
from numprune.export.checkpoint import audit, check_vocabulary, read_config, resolve, text_tokenizer
from numprune.export.disk import require_writable
from numprune.export.manifest import folder_digest
from numprune.export.runtimes import device_of as runtime_device
from numprune.export.runtimes.encoder import NAMES as ENCODER_RUNTIMES
from numprune.export.tasks import load_task
from numprune.export.tokenizer import other_reading
from numprune.export.vllm import CPU_HEAD_SIZES, check_per_layer, check_quantized, check_settings
from numprune.flows.names import (
    BUILT_IN,
    CAUSAL_LM,
    EMBEDDED,
    EXPORTS_OF_RUNTIME,
    ROOFLINE,
    RUNTIME_OF_EXPORT,
    export_of,
)
from numprune.flows.recipe import EMBEDDED_FOLDER, Recipe
from numprune.flows.run import Run
from numprune.flows.sections import Benchmark, Data, Quantize
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps import generators, harness
from numprune.flows.steps.baseline import prompts_of
from numprune.flows.steps.benchmark import exported_as
from numprune.flows.steps.estimates import estimate, estimate_key
from numprune.flows.steps.export import precision_of
from numprune.flows.steps.generate import encoded, read_prompts
from numprune.flows.steps.harness import Tasks
from numprune.flows.steps.learn import request_of
from numprune.flows.steps.prune import options_of
from numprune.flows.steps.text import read_images, text_digest
from numprune.flows.steps.timings import check_request, key_of, timing_request
from numprune.generation import encode
from numprune.learning import check_learning
from numprune.options import PruneOptions, check_options
from numprune.pictures import Picture
from numprune.quantization import GROUP_SIZES, Scheme, check_quantizable
from numprune.quantization.lm_head import check_groups
from numprune.recovery.rows import require_others
from numprune.scenario import parse_time
from numprune.search.refine import check_searchable
from numprune.serving.metrics import other_task
from numprune.serving.problems import did_you_mean, listed, models_in
from numprune.serving.registry import open_registry
from numprune.serving.report import ONCE, Report, TaskAccuracy, path_of
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import TESTED
from numprune.shaping import check_comparable
from numprune.tasks import Task, TaskName
from numprune.tasks.codes import ImageCodes
from numprune.tasks.image_classification import ImageClassification

# Figures of a classifier's quality that need labels.
_OF_LABELS = {
    *("accuracy_delta", "accuracy", "top5_accuracy", "right_to_wrong", "wrong_to_right"),
    *("nll_nats_per_text", "nll_nats_per_image"),
}
_MODULES = {
    "distill": ("accelerate",),
    "lora": ("peft",),
    "tasks": ("lm_eval",),
    "onnx": ("onnx", "onnxscript"),
    "onnxruntime": ("onnxruntime",),
}
_INSTALL = {
    **dict.fromkeys(("distill", "lora"), 'pip install "numprune[learn]"'),
    "tasks": harness.INSTALL,
    "onnx": "pip install onnx onnxscript",
    "onnxruntime": 'pip install "numprune[cpu]" or, for a GPU, "numprune[gpu]"',
}


Collect = Callable[..., Any]  # a field, a function and its arguments: the result, or None where it is a problem


def prepare(recipe: Recipe, workspace: Path) -> Run:
    """Return the run of a recipe with its inputs identified. Raises InputError as `check` does."""
    tasks = check(recipe, workspace)
    base, data = model_folder(recipe.model.path), recipe.data
    config = read_config(base)
    anatomy = read_anatomy(config)
    available = torch.cuda.is_available()
    return Run(
        recipe=recipe,
        workspace=workspace,
        base=Artifact(base, folder_digest(base)),
        task=anatomy.task,
        served=anatomy.task not in ("masked-lm", "image-classification") and family_of(config).vllm.runs,
        image_tokens=anatomy.context if anatomy.image else None,
        calibration=Text(data.calibration, text_digest(data.calibration, "train")),
        heldout={name: Text(text, text_digest(text, "heldout")) for name, text in data.corpora.items()},
        prompts=Text(recipe.recover.prompts, text_digest(recipe.recover.prompts, "train"))
        if recipe.recover.prompts
        else None,
        tasks=Text(recipe.evaluate.tasks, tasks.digest()) if tasks else None,
        decoder=generators.identified_at(recipe.evaluate.decoder),
        fid_network=generators.identified_at(recipe.evaluate.fid_network),
        fid_images=Text(recipe.evaluate.fid_images, text_digest(recipe.evaluate.fid_images, "heldout"))
        if recipe.evaluate.fid_images
        else None,
        device="cuda" if available and recipe.model.device != "cpu" else "cpu",
        uses_gpu=available and (recipe.model.device, recipe.benchmark.device) != ("cpu", "cpu"),
        precision=precisions(recipe, base),
        machine={
            "node": platform.node(),
            "cores": str(processors.count()),
            "gpu": torch.cuda.get_device_name() if available else "",
            **({"vllm": str(environment.find())} if [*_served_in(recipe)] else {}),
        },
        timings_key=_timings_key(recipe, base) if recipe.prune.allowed.time else "",
    )


def _timings_key(recipe: Recipe, base: Path) -> str:
    asked = recipe.timings
    estimated = asked.runtime == ROOFLINE
    key = estimate_key(base, asked.peaks().name) if estimated else key_of(base, asked.runtime)
    return key.model_dump_json()


def check(recipe: Recipe, workspace: Path) -> Tasks | None:
    """Refuse a recipe that cannot run here. Return its tasks, if it has some: loading them takes long.

    Raises InputError with every problem: field, value, allowed values.
    """
    problems: list[str] = []

    def collect(field: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NumpruneError as error:
            problems.append(f"{field}: {error}")
            return None

    tokenizer = anatomy = task = None
    collect("--workspace", require_writable, workspace)
    base = collect("model.path", model_folder, recipe.model.path)
    config = collect("model.path", read_config, base) if base else None
    if config is not None:
        collect("model.path", compressed_tensors.refuse_quantized, base, "pruning")
        collect("model.path", audit, base)
        tokenizer = collect("model.path", text_tokenizer, base)
        if tokenizer is not None:
            collect("model.path", check_vocabulary, base, tokenizer, config)
            if "vllm" in recipe.export.targets and (problem := other_reading(base)):
                problems.append(f"model.path: {problem}")
        anatomy, task = read_anatomy(config), collect("model.path", load_task, base)
        if tokenizer is not None and task is not None and task.prompted:
            collect("evaluate.prompts", check_prompts, tokenizer, recipe, anatomy.context)
        collect("prune", lambda: _check_pruning(recipe, anatomy, base))
        problems += _servers(recipe, anatomy, task)
        if recipe.evaluate.tasks and anatomy.task != CAUSAL_LM:
            problems.append(
                f"evaluate.tasks: only causal language models answer tasks; the model is for {anatomy.task}; omit it"
            )
        problems += _quantization(recipe, anatomy, config)
        problems += [*_encoders(recipe, anatomy), *_images(recipe, anatomy)]
        if isinstance(task, ImageCodes):
            problems += generators.problems(recipe, task, base, config)
        elif task is not None:
            problems += generators.others(recipe)
        formats = {*recipe.export.targets, *recipe.benchmark.runtimes}
        if formats & {"onnx", "onnxruntime", "tensorrt"}:
            collect("export.targets and benchmark.runtimes", onnx.check_config, config)
        if "onnxruntime" in recipe.export.targets:
            collect("export.targets", genai.check_config, config)
        if "vllm" in formats:
            collect("export.targets and benchmark.runtimes", check_settings, config)
        if "vllm" in formats and recipe.prune.allocation != "uniform":
            collect("prune.allocation", check_per_layer, anatomy)
        chosen = collect("export.dtype", precisions, recipe, base)
        if chosen is not None and "onnxruntime" in recipe.export.targets:
            device = runtime_device("onnxruntime", recipe.benchmark.device)
            collect("export.targets", genai.check_precision, chosen["onnxruntime"], device)
            for scheme in schemes_asked(recipe.quantize):
                collect("quantize.scheme", genai.check_scheme, scheme, chosen["onnxruntime"])
        problems += _lengths(recipe, anatomy.context, anatomy.task)
    tasks: Tasks | None = None
    if recipe.evaluate.tasks and not _missing("tasks"):
        tasks = collect("evaluate.tasks", load_tasks_of, recipe)
    data = recipe.data
    fields = {"data.calibration": data.calibration, **data.heldout_fields}
    texts = {field: text for field, text in fields.items() if isinstance(text, list)}
    judged_on: dict[str, list[Document] | list[Picture] | None] = {}
    if anatomy is not None and anatomy.image is not None:
        images = {field: collect(field, read_images, text, data.reading()) for field, text in fields.items()}
        images.pop("data.calibration")  # needs no labels
        judged_on = images
        for field, found in images.items():
            if found and isinstance(task, ImageClassification):
                collect(field, task.labels, found)
    elif tokenizer is not None or not data.chat:
        render = renderer(tokenizer) if data.chat else None
        read = {field: collect(field, read_documents, files, data.split, render) for field, files in texts.items()}
        trained = read.pop("data.calibration", None) or []
        judged_on = read
        if recipe.recover.method != "none":
            trained = [*trained, *_prompts(recipe, tokenizer, collect)]
        if {recipe.learn.method, recipe.recover.method} != {"none"}:
            for field, judged in read.items():
                collect(field, require_others, trained, judged or [])
    if data.split != WHOLE_FILE and not any(is_plain(Path(file)) for files in texts.values() for file in files):
        problems.append(f"data.split = {data.split!r}: there is no plain text file to split; omit it")
    problems += _combinations(recipe)
    unlabelled: set[str] = set()
    if anatomy is not None and anatomy.task.endswith("classification"):
        unlabelled = {field for field, items in judged_on.items() if items and all(one.label is None for one in items)}
    problems += _metrics(recipe, anatomy.task if anatomy else None, tasks, unlabelled)
    for field, name in _needed(recipe):
        problems += [f"{field}: {problem}" for problem in _missing(name)]
    if "tensorrt" in recipe.export.targets:
        collect("export.targets", tensorrt.require)
    for field in _served_in(recipe):
        vllm = collect(field, environment.find)
        if vllm and vllm.cpu and anatomy is not None:
            problems += [f"{field}: {problem}" for problem in _kernels(anatomy)]
    if recipe.registry.uri != "workspace":
        collect("registry.uri", open_registry, recipe.registry.uri, workspace)
    if "cuda" in (recipe.model.device, recipe.benchmark.device) and not torch.cuda.is_available():
        problems.append("device = 'cuda': torch sees no CUDA device; use auto or cpu")
    if problems:
        raise InputError(listed("the recipe cannot run here", problems))
    return tasks


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, collect: Collect) -> list[Document]:
    """The prompts that the dense model is to answer."""
    files, length = recipe.recover.prompts, recipe.data.sequence_length
    found: list[Document] = collect("recover.prompts", read_prompts, files) if files else []
    if found and tokenizer is not None:
        collect("recover.prompts", encoded, found, tokenizer, length)
    return found or []


def check_prompts(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, context: int) -> None:
    """Raises InputError for the first prompt that the model cannot take."""
    for prompt in prompts_of(recipe.evaluate.prompts):
        encode(tokenizer, prompt, context)


def pruning_options(recipe: Recipe, base: Path) -> PruneOptions:
    """The options that the model in `base` is pruned with. Raises InputError where its budget is not one of it."""
    options = options_of(recipe.prune, recipe.sizes(), base, recipe.quantize.scheme)
    masks = recipe.learn.method
    return options if masks == "none" else replace(options, criterion=masks)


def _check_pruning(recipe: Recipe, anatomy: Anatomy, base: Path) -> None:
    """Raises InputError if the request cannot be met, or masks cannot learn it."""
    if recipe.prune.allowed.time is not None:
        scenario = parse_time(recipe.prune.allowed.time)[1]
        if recipe.timings.runtime == ROOFLINE:
            estimate(base, [scenario], recipe.sizes(), recipe.timings.sizes, recipe.timings.peaks())
        else:
            check_request(base, timing_request(recipe.timings, str(scenario), recipe.sizes()))
            _check_timed_is_exported(recipe, base)
    options = pruning_options(recipe, base)
    if recipe.learn.method == "none":
        check_options(anatomy, options)
        if recipe.prune.refine != "none":
            check_searchable(recipe.data.samples, resident=not recipe.prune.stream)
        if options.shapes:
            check_comparable(recipe.data.samples, resident=not recipe.prune.stream)
    else:
        # What a budget of time allows is known once blocks are measured.
        timed = recipe.prune.allowed.time is not None
        constraint = "parameters" if timed else request_of(recipe.learn, options).constraint
        check_learning(anatomy, options, constraint, recipe.data.sequence_length)
    narrower = f"axes: with {HIDDEN_SIZE}" if HIDDEN_SIZE in recipe.prune.axes else "hidden_size: with a smaller one"
    if (HIDDEN_SIZE in recipe.prune.axes or recipe.prune.hidden_size) and recipe.recover.method == "distill":
        if recipe.recover.train == "blocks":
            raise InputError(
                f"{narrower}, blocks cannot be priced in the dense model; set recover.train to all or lora"
            )
        if recipe.recover.hidden_weight:
            raise InputError(
                f"{narrower}, hidden states cannot be compared with the dense model's; set recover.hidden_weight to 0"
            )


def _check_timed_is_exported(recipe: Recipe, base: Path) -> None:
    """Raises InputError if the latencies would be those of an export that the release does not have."""
    runtime = recipe.timings.runtime
    timed = exported_as(runtime, [base], precision_of(base, runtime, recipe.export.dtype))
    if timed and timed not in recipe.export.targets:
        raise InputError(
            f"timings.runtime = {runtime!r}: this model is timed as the export {timed!r}, and export.targets are "
            f"{', '.join(recipe.export.targets) or 'empty'}; add {timed!r} to them, or choose torch"
        )


def load_tasks_of(recipe: Recipe) -> Tasks:
    """The recipe's tasks, with their data. Raises as `harness.load_tasks`."""
    asked = recipe.evaluate
    return harness.load_tasks(asked.tasks, asked.num_fewshot, asked.limit)


def schemes_asked(asked: Quantize) -> list[Scheme]:
    """The schemes to which blocks may be quantized."""
    groups = asked.channels_per_scale
    return [Scheme(name, groups if name == "w4a16" else None) for name in LEVELS[asked.scheme] if name]


def model_folder(path: str) -> Path:
    """The folder of a recipe's model. Raises InputError."""
    return EMBEDDED_FOLDER / "model" if path == EMBEDDED else resolve(path)


def model_name(path: str) -> str:
    """The last part of a folder's path; a hub id, or EMBEDDED, as it is."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def precisions(recipe: Recipe, base: Path) -> dict[str, str]:
    """Runtime -> its compute precision. Raises InputError if a runtime does not support the requested one."""
    exported = {name if name == "vllm" else RUNTIME_OF_EXPORT[name] for name in recipe.export.targets}
    return {
        runtime: precision_of(base, runtime, recipe.export.dtype, recipe.benchmark.device)
        for runtime in sorted({*exported, *recipe.benchmark.runtimes})
    }


def _lengths(recipe: Recipe, context: int, task: TaskName) -> list[str]:
    problems = []
    if task == "image-classification":
        return []
    if recipe.data.sequence_length > context:
        problems.append(
            f"data.sequence_length = {recipe.data.sequence_length}: the model takes at most {context} tokens"
        )
    if task != CAUSAL_LM:
        longest = max(recipe.benchmark.lengths)
        if longest > context:
            problems.append(f"benchmark.lengths = {recipe.benchmark.lengths}: the model takes at most {context} tokens")
        return problems
    positions = recipe.benchmark.prompt_length + recipe.benchmark.output_length
    if positions > context:
        problems.append(
            f"benchmark.prompt_length + output_length = {positions}: the model takes at most {context} tokens"
        )
    return problems


def _encoders(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """Settings that do not apply to encoders."""
    if anatomy.task == CAUSAL_LM:
        return []
    problems = [
        f"benchmark.runtimes: {runtime} times generation, which {anatomy.task} models do not have; they are timed in "
        f"{' and '.join(ENCODER_RUNTIMES)}"
        for runtime in recipe.benchmark.runtimes
        if runtime not in ENCODER_RUNTIMES
    ]
    if "tensorrt" in recipe.export.targets:
        problems.append("export.targets: engines are built only for decoders; omit tensorrt")
    if recipe.benchmark.torch_mode != "auto":
        problems.append(
            f"benchmark.torch_mode = {recipe.benchmark.torch_mode!r}: only decoding is compiled, and {anatomy.task} "
            "models do not generate; omit it"
        )
    if recipe.recover.prompts:
        problems.append(f"recover.prompts: {anatomy.task} models do not generate; omit it")
    if recipe.recover.top_k != "all":
        problems.append(f"recover.top_k: only for causal language models, and the model is for {anatomy.task}; omit it")
    if recipe.evaluate.prompts not in (BUILT_IN, []):
        problems.append(f"evaluate.prompts: {anatomy.task} models do not generate; omit it")
    return problems


def _images(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """Settings that do not apply to models that read images."""
    if anatomy.image is None:
        return []
    problems = [
        f"{field} = {asked!r}: the model reads images, which all have one size; omit it"
        for field, asked, default in (
            ("data.sequence_length", recipe.data.sequence_length, Data.model_fields["sequence_length"].default),
            ("benchmark.lengths", recipe.benchmark.lengths, Benchmark.model_fields["lengths"].default),
        )
        if asked != default
    ]
    trained = [name for name in ("learn", "recover") if getattr(recipe, name).method != "none"]
    return [*problems, *(f"{name}.method: trains on text, and the model reads images; omit it" for name in trained)]


def _servers(recipe: Recipe, anatomy: Anatomy, task: Task | None) -> list[str]:
    """Problems that keep the servers from running the result, regardless of its sizes."""
    if "vllm" not in recipe.export.targets:
        return []
    problems = []
    if task is not None:
        try:
            vllm_pooling.options(anatomy, task)
        except InputError as error:
            problems.append(f"export.targets: {error}")
    if recipe.target.vllm not in TESTED:
        problems.append(f"target.vllm = {recipe.target.vllm!r}: the tested versions are {', '.join(TESTED)}")
    if recipe.target.device == "cpu":
        problems += [f"target.device = 'cpu': {problem}" for problem in _kernels(anatomy)]
    return problems


def _quantization(recipe: Recipe, anatomy: Anatomy, config: Any) -> list[str]:
    """Problems that keep the result from being quantized or run."""
    if recipe.quantize.scheme == "none":
        return []
    asked, problems = recipe.quantize, []
    schemes = schemes_asked(asked)
    where = f"quantize.scheme = {asked.scheme!r}"
    try:
        check_quantizable(anatomy, replace(schemes[0], group_size=None))  # groups are for the target's sizes
    except InputError as error:
        problems.append(f"{where}: {error}")
    if asked.channels_per_scale and anatomy.hidden_size % asked.channels_per_scale:
        fitting = [str(size) for size in GROUP_SIZES if anatomy.hidden_size % size == 0]
        remedy = f"set it to {' or '.join(fitting)}" if fitting else "choose w8a8 or fp8"
        problems.append(
            f"quantize.group_size = {asked.channels_per_scale}: does not divide the model's hidden_size "
            f"{anatomy.hidden_size}; {remedy}"
        )
    if asked.lm_head_bits == 4:
        try:
            genai.check_lm_head(config, schemes, 4)
            for size in _hidden_sizes(recipe):
                check_groups(size)
        except InputError as error:
            problems.append(f"quantize.{error}")
        if "onnxruntime" not in recipe.export.targets:
            problems.append(
                "quantize.lm_head_bits = 4: only the export onnxruntime stores 4 bits; add it to export.targets, or "
                "leave lm_head_bits out"
            )
    formats = {*recipe.export.targets, *recipe.benchmark.runtimes}
    if "vllm" in formats:
        for scheme in schemes:
            try:
                check_quantized(scheme, config.dtype, recipe.target.device)
            except InputError as error:
                problems.append(f"{where}: {error}")
    if recipe.export.dtype != "auto":
        problems.append(f"export.dtype = {recipe.export.dtype!r}: quantized weights have their own format; omit it")
    if "tensorrt" in formats:
        problems.append(f"{where}: engines are built only from unquantized checkpoints; omit tensorrt")
    if any(scheme.rounds_inputs for scheme in schemes) and "onnx" in recipe.export.targets:
        problems.append(
            f"{where}: the graph of the export onnx rounds no activations; choose w4a16, or replace onnx with "
            "onnxruntime in export.targets"
        )
    return problems


def _hidden_sizes(recipe: Recipe) -> Iterator[int]:
    """The hidden sizes that the model may be pruned to, or if masks choose it, one that divides all of theirs."""
    asked = recipe.prune.hidden_size
    yield from asked if isinstance(asked, list) else [asked]
    if HIDDEN_SIZE in recipe.prune.axes:
        yield lcm(recipe.sizes().align, recipe.sizes().quantization_group)


def _served_in(recipe: Recipe) -> Iterator[str]:
    """Fields that ask for a vLLM server."""
    if "vllm" in recipe.benchmark.runtimes:
        yield "benchmark.runtimes"
    if recipe.evaluate.tasks and recipe.evaluate.task_runtime == "vllm":
        yield "evaluate.task_runtime"


def _kernels(anatomy: Anatomy) -> list[str]:
    """Problems that keep vLLM from running the result on CPUs."""
    if anatomy.head_dim in CPU_HEAD_SIZES:
        return []
    return [
        f"vLLM's CPU kernels support head sizes {', '.join(map(str, CPU_HEAD_SIZES))}, but the model's is "
        f"{anatomy.head_dim}; serve it on GPUs, or omit vllm from export.targets and benchmark.runtimes"
    ]


def _combinations(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.benchmark.prompts % recipe.benchmark.batch_size:
        problems.append(
            f"benchmark.prompts = {recipe.benchmark.prompts}: must be a multiple of benchmark.batch_size = "
            f"{recipe.benchmark.batch_size}"
        )
    if recipe.evaluate.task_runtime == "vllm" and "vllm" not in recipe.export.targets:
        problems.append(
            "evaluate.task_runtime = 'vllm': serves the export 'vllm'; add it to export.targets, or choose torch"
        )
    if recipe.benchmark.torch_mode != "auto" and "torch" not in recipe.benchmark.runtimes:
        problems.append(
            f"benchmark.torch_mode = {recipe.benchmark.torch_mode!r}: torch is not among benchmark.runtimes; omit it"
        )
    for runtime in recipe.benchmark.runtimes:
        exports = EXPORTS_OF_RUNTIME.get(runtime)
        if exports and export_of(runtime, recipe.export.targets) is None:
            problems.append(
                f"benchmark.runtimes: {runtime} runs the export {' or '.join(map(repr, exports))}; add it to "
                "export.targets"
            )
    return problems


def _metrics(recipe: Recipe, task: TaskName | None, tasks: Tasks | None, unlabelled: Collection[str] = ()) -> list[str]:
    """Gates that can only fail, because the report will not have the figure.

    `tasks`: None if there are none, or if they could not be loaded. `unlabelled`: fields of held-out text or images
    without labels.
    """
    problems = []
    for index, gate in enumerate(recipe.gates):
        section, name, *rest = path_of(gate.metric).split(".")
        where = f"gates.{index}.metric = {gate.metric!r}"
        of_corpus, corpus = (section, name) == ("quality", "corpora"), next(iter(recipe.data.corpora))
        if of_corpus:
            if unknown := _corpus(recipe, rest):
                problems.append(f"{where}: {unknown}")
                continue
            corpus, name, *rest = [*rest, ""]
        if task and (why := other_task(".".join([section, name, *rest]), task)):
            problems.append(f"{where}: {why}")
            continue
        judged = f"data.heldout.{corpus}".rstrip(".")
        if section == "quality" and judged in unlabelled and not {name, *rest[:1]}.isdisjoint(_OF_LABELS):
            problems.append(f"{where}: {judged} has no labels; label it, or use quality.loss_delta")
            continue
        if section == "tasks":
            problems += [f"{where}: {problem}" for problem in _task_metric(recipe, gate.bound, name, rest, tasks)]
            continue
        field = Report.model_fields.get(section)
        if field is None:
            problems.append(
                f"{where}: the report has no section {section!r}{did_you_mean(section, list(Report.model_fields))}"
            )
            continue
        if section in ("speed", "memory"):
            if name not in recipe.benchmark.runtimes:
                runtimes = ", ".join(recipe.benchmark.runtimes)
                problems.append(f"{where}: {name!r} is not benchmarked; benchmark.runtimes are {runtimes}")
            name = rest[0] if rest else ""
        known = [key for model in models_in(field.annotation) for key in model.model_fields]
        known = [key for key in known if not (of_corpus and key in ONCE)]
        if known and name not in known:
            problems.append(f"{where}: the report has no such figure{did_you_mean(name, known)}")
        if recipe.quantize.scheme == "none" and "quantization" in (section, name.partition("_")[0]):
            problems.append(f"{where}: quantize.scheme = 'none' has no such figure; choose a scheme or drop the gate")
        kind = "recovery" if (section, name) == ("quality", "pruned") else name.partition("_")[0]
        for training, figures in (("learn", "learning"), ("recover", "recovery")):
            if getattr(recipe, training).method == "none" and figures in (section, kind):
                problems.append(
                    f"{where}: {training}.method = 'none' has no such figure; choose a method or drop the gate"
                )
        if (section, name) == ("quality", "generation") and not recipe.evaluate.prompts:
            problems.append(f"{where}: evaluate.prompts = [] generates nothing; add prompts")
    return problems


def _task_metric(recipe: Recipe, bound: str, name: str, rest: Sequence[str], tasks: Tasks | None) -> Iterator[str]:
    """Why the report's section `tasks` will not have the figure or its bound; nothing if it will."""
    if not recipe.evaluate.tasks:
        yield "evaluate.tasks = [] answers none; add the task"
    elif tasks is None:  # said already
        return
    elif name not in tasks.members:
        yield f"{name!r} is not among evaluate.tasks, which are {', '.join(tasks.members)}"
    elif (
        len(rest) != 2
        or rest[0] not in tasks.metrics(name)
        or rest[1] not in {*TaskAccuracy.model_fields} - {"runtime"}
    ):
        metrics = " or ".join(tasks.metrics(name))
        yield f"the report has no such figure; use tasks.{name}.METRIC.accuracy_delta with METRIC {metrics}"
    elif rest[1] != "accuracy_delta" and bound != "point":
        yield 'only accuracy_delta has bounds; use it, or bound = "point"'


def _corpus(recipe: Recipe, path: Sequence[str]) -> str:
    """Why the report has no such corpus; empty if it has. `path`: the corpus's name and the figure."""
    first, *others = recipe.data.corpora
    asked, figure = path[0] if path else "", ".".join(path[1:])
    if not first:
        return "data.heldout is one text without a name; name several, or use quality.loss_delta"
    if asked == first:
        return f"{first!r} is the first corpus, which quality itself is of; use quality.{figure}"
    if asked in others:
        return ""
    return f"data.heldout has no such corpus; beside the first, {first!r}, there are: {', '.join(others) or 'none'}"


def _needed(recipe: Recipe) -> list[tuple[str, str]]:
    asked: list[tuple[str, Sequence[str]]] = [
        ("recover.method", [recipe.recover.method]),
        ("recover.train", [recipe.recover.train] if recipe.recover.method != "none" else []),
        ("evaluate.tasks", ["tasks"] if recipe.evaluate.tasks else []),
        ("export.targets", recipe.export.targets),
        ("benchmark.runtimes", recipe.benchmark.runtimes),
    ]
    names = [(field, name) for field, given in asked for name in given if name in _MODULES]
    if "onnx" in recipe.export.targets:
        names.append(("export.targets", "onnxruntime"))  # parity runs the exports
    return list(dict.fromkeys(names))


def _missing(name: str) -> list[str]:
    problems = []
    for module in _MODULES[name]:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # a missing shared library sometimes raises OSError
            problems.append(
                f"{name} needs the package {module}, which cannot be imported ({error}): {_INSTALL[module]}"
            )
    return problems
