"""Measures the table of block latencies, model by model, so that a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from numprune.anatomy import read_anatomy
from numprune.blocks import Anatomy
from numprune.configs import pruned_config
from numprune.errors import EnvironmentInvalid, InputError, MissingRuntime
from numprune.export import (
    checkpoint,
    compressed_tensors,
    disk,
    manifest,
    precision,
    processors,
    random_weights,
    tensorrt,
    vllm,
)
from numprune.export.runtimes import device_of
from numprune.families import FAMILIES
from numprune.flows.names import CAUSAL_LM, TIMINGS
from numprune.flows.sections import BlockTimings
from numprune.flows.stages import code_version
from numprune.flows.steps.benchmark import encoder_load
from numprune.flows.steps.export import precision_of
from numprune.flows.steps.served import as_served, check_served, opened_by
from numprune.flows.steps.training import alone_in
from numprune.hidden import Width
from numprune.progress import Progress, progress
from numprune.scenario import Scenario, check_scenario, parse_scenario
from numprune.served import AS_STORED, Served
from numprune.serving.benchmark.client import Worker
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.visits import (
    Runtime,
    Timed,
    Visit,
    check_quiet,
    check_state,
    drift,
    order,
    visit,
    weighted_medians,
)
from numprune.serving.benchmark.vllm.engines import ahead
from numprune.serving.report import capture, package_versions, replace
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import INSTALL, Environment
from numprune.target import Target
from numprune.timed_models import TimedModel, TimedModels, Weights, check_measurable, within_layers
from numprune.timings import BlockTime, Key, ScenarioTimes, Time, TimingTable, anatomy_at, shape_of, sizes_to_time

_ANCHORS = 3  # visits of the largest model at the start and at the end of a run
_PACKAGES = {"torch": ("torch", "transformers"), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        runtime: "torch", "onnxruntime", "tensorrt" or "vllm".
        scenarios: to time each block in.
        target: of the pruned model; sizes it does not support are not measured.
        sizes: of each kind of block.
        visits: of each model.
        seed: of the order and of the weights.
        served: how the model is.
        width: of the pruned model; None: its hidden size is the model's own.
    """

    runtime: str
    scenarios: Sequence[Scenario]
    target: Target
    sizes: int
    visits: int
    seed: int
    served: Served = AS_STORED
    width: Width | None = None


def timing_request(
    asked: BlockTimings, scenario: str, target: Target, served: Served, width: Width | None = None
) -> Request:
    """Return the request of a recipe."""
    scenarios = [parse_scenario(scenario)]
    return Request(asked.runtime, scenarios, target, asked.sizes, asked.visits, asked.seed, served, width)


def key_of(base: Path, runtime: str, served: Served = AS_STORED) -> Key:
    """Return what a table measured here at the model's own hidden size would be valid for.

    Raises InputError, MissingRuntime.
    """
    used, anatomy = runtime_of(base, runtime, served), read_anatomy(checkpoint.read_config(base))
    return Key(
        runtime=runtime,
        versions=_versions(used),
        implementation=_implementation(anatomy) if used.vllm else None,
        device=_device_name(used),
        threads=torch.get_num_threads() if runtime == "torch" else processors.count(),
        dtype=used.dtype,
        quantization=served.quantization,
        tensor_parallel=served.tensor_parallel,
        shape=shape_of(anatomy),
    )


def runtime_of(base: Path, name: str, served: Served = AS_STORED) -> Runtime:
    """Return the runtime on this machine, in the precision in which the model in `base` is served.

    Raises InputError, MissingRuntime.
    """
    if name == "tensorrt":
        tensorrt.require()
    found = environment.find() if name == "vllm" else None
    device = device_of(name) if found is None else "cpu" if found.cpu else "cuda"
    return Runtime(name, device, precision_of(base, name, served.dtype), found, served.tensor_parallel)


def _versions(used: Runtime) -> dict[str, str]:
    if used.vllm:
        return {"vllm": used.vllm.version, **({"numprune-vllm": used.vllm.plugin} if used.vllm.plugin else {})}
    if used.name == "tensorrt":  # its package has a different name for each CUDA
        return {"tensorrt": tensorrt.require().__version__}
    return package_versions(_PACKAGES[used.name])


def _implementation(anatomy: Anatomy) -> Literal["plug-in", "stock"]:
    """Return which classes vLLM builds layers of different sizes with."""
    return "plug-in" if FAMILIES[anatomy.family].vllm.per_layer else "stock"


def _device_name(used: Runtime) -> str:
    if used.device == "cpu":
        return capture().cpu
    if used.vllm is None:
        return torch.cuda.get_device_name()
    found = capture(uses_gpu=True)  # vLLM's environment has its own torch
    if found.gpu is None:
        raise EnvironmentInvalid("; ".join(found.reasons))
    return found.gpu.name


def check_request(base: Path, asked: Request) -> None:
    """Refuse a request that `measure` does not support. Raises InputError, MissingRuntime."""
    compressed_tensors.refuse_quantized(base, "timing of blocks")
    if asked.runtime in _PACKAGES and not package_versions(_PACKAGES[asked.runtime]):
        raise MissingRuntime(
            f'runtime {asked.runtime} is not installed; pip install "numprune[cpu]" or, for a GPU, "numprune[gpu]"'
        )
    config = checkpoint.read_config(base)
    anatomy = anatomy_at(read_anatomy(config), asked.width, asked.target)
    check_measurable(anatomy)
    if anatomy.task != CAUSAL_LM:
        encoder_load(anatomy, asked.runtime, {})
    if asked.runtime == "tensorrt":
        tensorrt.check_model(base)
    for scenario in asked.scenarios:
        load = timed_in(scenario, anatomy).load()
        extra = ahead(load) if asked.runtime == "vllm" and isinstance(load, Load) else 0
        check_scenario(scenario, anatomy, load.positions + extra)
    used = runtime_of(base, asked.runtime, asked.served)
    check_served(pruned_config(config, anatomy) if asked.width else config, used, asked.served)
    if used.vllm:
        _check_models_in_vllm(base, anatomy, used.vllm, asked, used.dtype)
    else:
        sizes_to_time(anatomy, asked.target, asked.sizes)


def _check_models_in_vllm(base: Path, anatomy: Anatomy, found: Environment, asked: Request, dtype: str) -> None:
    """Raises InputError, MissingRuntime unless vLLM runs every model that is timed."""
    config = checkpoint.read_config(base)
    vllm.check_settings(config)
    if dtype not in precision.DTYPES:
        raise InputError(f"timings: {base} is stored in {dtype}; vLLM computes in {', '.join(precision.DTYPES)}")
    head, sizes_of_kinds = anatomy.head_dim, sizes_to_time(anatomy, asked.target, asked.sizes)
    timed = TimedModels(anatomy, sizes_of_kinds, asked.served.bytes_per_weight(precision.DTYPES[dtype].itemsize))
    if found.cpu and head not in vllm.CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, vllm.CPU_HEAD_SIZES))
        raise InputError(f"timings: vLLM's CPU kernels have heads of {sizes}, and the model's have {head}; use a GPU")
    for model in timed.models:
        built, dropped = timed.built(model)
        facts = vllm.preflight(pruned_config(config, built, dropped=dropped))
        if facts["plugin"] and found.plugin is None:
            raise MissingRuntime(f"timings: {found.python.parent.parent} lacks the plug-in numprune-vllm; {INSTALL}")


def measure(base: Path, asked: Request, scratch: Path) -> TimingTable:
    """Return the measured table of the model in `base`.

    Args:
        scratch: a folder for the models and measurements of a killed run; the same request goes on there, also with
            more visits.

    Raises:
        InputError: `check_request` refuses it, or another process is measuring the same.
        EnvironmentInvalid: the machine drifts, is busy, or its GPU throttles, and measurements are discarded; or they
            are too few for the noise, and kept.
        MissingRuntime, WorkerError: as the benchmark.
    """
    check_request(base, asked)
    run = _Run(base, asked, scratch)
    with alone_in(run.folder, "measurement"):
        try:
            run.complete()
            drifts = run.drifts()
        except EnvironmentInvalid:
            shutil.rmtree(run.folder)
            raise
        table = run.table(drifts)
        shutil.rmtree(run.folder)
    return table


class _Run:
    """One measurement: its models, and the folder that keeps what is done."""

    def __init__(self, base: Path, asked: Request, scratch: Path) -> None:
        self.base, self.asked = base, asked
        self.config = checkpoint.read_config(base)
        self.anatomy = anatomy_at(read_anatomy(self.config), asked.width, asked.target)
        self.key = key_of(base, asked.runtime, asked.served).model_copy(update={"shape": shape_of(self.anatomy)})
        self.runtime = runtime_of(base, asked.runtime, asked.served)
        sizes = sizes_to_time(self.anatomy, asked.target, asked.sizes)
        unquantized = precision.DTYPES[self.key.dtype].itemsize
        self.plan = TimedModels(self.anatomy, sizes, asked.served.bytes_per_weight(unquantized))
        described = {
            "key": self.key.model_dump(),
            "config": self.config.to_dict(),
            "scenarios": [str(scenario) for scenario in asked.scenarios],
            "models": [model.name for model in self.plan.models],
            "seed": asked.seed,
            "code": code_version("serving"),
        }
        identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = scratch / f"{TIMINGS}{identity[:16]}"

    def complete(self) -> None:
        """Measure what is missing. Raises EnvironmentInvalid."""
        if missing := [self._bytes(model) for model in self.plan.models if not self._place(model).is_dir()]:
            # One is written, and perhaps quantized, before it is exported.
            disk.require_room(self.folder, sum(missing) + max(missing) * (1 if self.asked.served.scheme is None else 2))
        for model in progress(self.plan.models, "timings: write models", "model"):
            self._write(model)
        timed = {str(scenario): timed_in(scenario, self.anatomy) for scenario in self.asked.scenarios}
        visits = order([model.name for model in self.plan.models], self.asked.visits, self.asked.seed)
        todo = [(name, number) for name, number in visits if not self._done(name, number).is_file()]
        uses_gpu = self.runtime.device == "cuda"
        with self.runtime.start() as worker:
            before = capture(uses_gpu=uses_gpu, own_processes=[worker.pid])
            total = len(visits) + 2 * _ANCHORS
            with Progress(total, f"timings ({self.runtime.name})", "visit", done=len(visits) - len(todo)) as bar:
                made = [*self._visit_anchor(worker, timed, bar)] if todo or len(self._anchors()) < 2 else []
                for name, number in todo:
                    made.append(self._visit(worker, name, timed))
                    replace(self._done(name, number), json.dumps(made[-1].ms))
                    bar.update()
                made += self._visit_anchor(worker, timed, bar)
            after = capture(uses_gpu=uses_gpu, own_processes=[worker.pid])
        check_quiet(made)
        check_state(before, after)

    def _write(self, model: TimedModel) -> None:
        """Write a model with random weights in the form that the runtime opens, unless it is there."""
        folder = self._place(model)
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        dtype = precision.DTYPES[self.key.dtype]
        with _temporary(folder) as scratch:
            random_weights.write_random(scratch / "random", self._config(model), self.base, dtype, self.asked.seed)
            source = as_served(scratch / "random", scratch / "quantized", self.asked.served)
            timed = [timed_in(scenario, self.anatomy) for scenario in self.asked.scenarios]
            opened_by(self.runtime, {"exported": source}, scratch, timed)["exported"].rename(folder)

    def _place(self, model: TimedModel) -> Path:
        return self.folder / "models" / model.name

    def _bytes(self, model: TimedModel) -> int:
        parameters = self.anatomy.fixed_parameters + self.plan.parameters(model)
        return parameters * precision.DTYPES[self.key.dtype].itemsize

    def _config(self, model: TimedModel) -> Any:
        anatomy, dropped = self.plan.built(model)
        return pruned_config(self.config, anatomy, dropped=dropped)

    def _done(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.visit-{number}.json"

    def _anchors(self) -> list[Path]:
        """Return the measurements of the largest model, in the order in which they were made."""
        return sorted(self.folder.glob("anchor-*.json"))

    def _visit_anchor(self, worker: Worker, timed: Mapping[str, Timed], bar: Progress) -> list[Visit]:
        largest = max(self.plan.models, key=self.plan.parameters)
        found = []
        for _ in range(_ANCHORS):
            found.append(self._visit(worker, largest.name, timed))
            bar.update()
        replace(self.folder / f"anchor-{len(self._anchors()):04}.json", json.dumps([one.ms for one in found]))
        return found

    def _visit(self, worker: Worker, name: str, timed: Mapping[str, Timed]) -> Visit:
        return visit(worker, self.runtime, self.folder / "models" / name, timed)

    def drifts(self) -> dict[str, float]:
        """Return the largest drift of the anchor in each scenario. Raises EnvironmentInvalid."""
        first, *others = [json.loads(path.read_text()) for path in self._anchors()]
        return {
            name: max((_drift(name, first, other) for other in others), key=lambda ratio: abs(ratio - 1))
            for name in map(str, self.asked.scenarios)
        }

    def table(self, drifts: dict[str, float]) -> TimingTable:
        """Return the table of what was measured. Raises EnvironmentInvalid."""
        found = {
            model.name: [json.loads(self._done(model.name, number).read_text()) for number in range(self.asked.visits)]
            for model in self.plan.models
        }
        return TimingTable(
            key=self.key,
            copies={kind: self.plan.copies(kind) for kind in self.plan.sizes},
            visits=self.asked.visits,
            drift=drifts,
            routing="uniform" if self.anatomy.of_kind("experts") else None,
            scenarios=[self._times(str(scenario), found) for scenario in self.asked.scenarios],
        )

    def _times(self, scenario: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> ScenarioTimes:
        def time(weights: Weights, what: str) -> Time:
            latencies = [[one[scenario] for one in found[model.name]] for model in weights]
            ms, interval = weighted_medians(latencies, [*weights.values()], self.asked.seed)
            return _positive(ms, interval, f"{what} in {scenario}")

        blocks: dict[str, list[BlockTime]] = {}
        for kind, sizes in self.plan.sizes.items():
            for size in sizes:
                of_size = time(self.plan.of_block(kind, size), f"{kind} of {size.units}x{size.members} units")
                one = BlockTime(**vars(of_size), units=size.units, members=size.members)
                blocks.setdefault(kind, []).append(one)
        return ScenarioTimes(
            scenario=scenario,
            around=time(self.plan.around(), "embeddings and head"),
            blocks=blocks,
            within_layers=within_layers(self.anatomy),
        )


def timed_in(scenario: Scenario, anatomy: Anatomy) -> Timed:
    return Timed(scenario.phase, scenario.batch, scenario.tokens or anatomy.context, scenario.output)


def _drift(scenario: str, start: Sequence[Mapping[str, float]], end: Sequence[Mapping[str, float]]) -> float:
    return drift([one[scenario] for one in start], [one[scenario] for one in end])


def _positive(ms: float, interval: tuple[float, float], what: str) -> Time:
    if ms <= 0:
        raise EnvironmentInvalid(
            f"the machine is too noisy: {what} would take {ms:.3g} ms (95 % interval {interval[0]:.3g} to "
            f"{interval[1]:.3g}); measure again with more visits, which continues this measurement, or larger batches"
        )
    return Time(ms=ms, interval95=interval)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` for models that are only needed until the block ends."""
    scratch = folder.with_name(f"{folder.name}.source")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    scratch.mkdir()
    manifest.sweep(folder.parent)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
