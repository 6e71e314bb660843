"""Settings of a recipe that contradict each other, or do not apply to its model."""

from pathlib import Path

from numprune.blocks import Anatomy
from numprune.documents import WHOLE_FILE, is_plain
from numprune.export.runtimes.encoder import NAMES as ENCODER_RUNTIMES
from numprune.flows.names import BUILT_IN, CAUSAL_LM, EXPORTS_OF_RUNTIME, export_of
from numprune.flows.recipe import Recipe
from numprune.flows.sections import Benchmark, Data
from numprune.tasks import TaskName


def lengths(recipe: Recipe, context: int, task: TaskName) -> list[str]:
    """Lengths, in tokens, beyond the model's `context`."""
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


def encoders(recipe: Recipe, anatomy: Anatomy) -> list[str]:
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


def images(recipe: Recipe, anatomy: Anatomy) -> list[str]:
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


def combinations(recipe: Recipe) -> list[str]:
    """Settings that contradict each other, whatever the model is."""
    data = recipe.data
    problems: list[str] = []
    texts = [text for text in (data.calibration, *data.corpora.values()) if isinstance(text, list)]
    if data.split != WHOLE_FILE and not any(is_plain(Path(file)) for files in texts for file in files):
        problems.append(f"data.split = {data.split!r}: there is no plain text file to split; omit it")
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
