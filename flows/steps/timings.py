"""Measures the table of block latencies, model by model, so that a killed run goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from numprune.anatomy import read_anatomy
from numprune.configs import pruned_config
from numprune.errors import EnvironmentInvalid, InputError, MissingRuntime
from numprune.export import checkpoint, compressed_tensors, disk, manifest, precision, processors, random_weights
from numprune.export.runtimes import device_of
from numprune.families import Kind
from numprune.flows.names import TIMINGS
from numprune.flows.sections import BlockTimings
from numprune.flows.stages import code_version
from numprune.flows.steps.benchmark import exported_as
from numprune.flows.steps.export import export, precision_of
from numprune.flows.steps.training import alone_in
from numprune.progress import Progress, progress
from numprune.scenario import Scenario, parse_scenario
from numprune.serving.benchmark.client import Worker
from numprune.serving.benchmark.visits import (
    QUIET,
    Runtime,
    Timed,
    Visit,
    check_quiet,
    drift,
    order,
    visit,
    weighted_medians,
)
from numprune.serving.report import capture, combine, package_versions, replace
from numprune.slices import GONE, Size
from numprune.target import Target
from numprune.timings import (
    BlockTime,
    Key,
    ScenarioTimes,
    Time,
    TimingTable,
    check_measurable,
    shape_of,
    sizes_to_time,
)

# Copies of a block together hold at least this, several times a CPU's cache: blocks of a whole model are not cached.
_COPIES_BYTES = 128 << 20
_FEWEST_COPIES = 4
_ANCHORS = 3  # visits of the largest model at the start and at the end of a run
_PACKAGES = {"torch": ("torch", "transformers"), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        runtime: "torch" or "onnxruntime".
        scenarios: to time each block in.
        target: of the pruned model; sizes it does not support are not measured.
        sizes: of each kind of block.
        visits: of each model.
        seed: of the order and of the weights.
    """

    runtime: str
    scenarios: Sequence[Scenario]
    target: Target
    sizes: int
    visits: int
    seed: int


def timing_request(asked: BlockTimings, scenario: str, target: Target) -> Request:
    """Return the request of a recipe."""
    return Request(asked.runtime, [parse_scenario(scenario)], target, asked.sizes, asked.visits, asked.seed)


@dataclass(frozen=True)
class _Model:
    """A model with `copies` blocks of one kind and size, and as little else as possible."""

    kind: Kind
    size: Size
    copies: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size.units}x{self.size.members}-{self.copies}"


def key_of(base: Path, runtime: str, quantization: str = "none", tensor_parallel: int = 1) -> Key:
    """Return what a table measured here would be valid for. Raises InputError, MissingRuntime."""
    device = device_of(runtime)
    threads = torch.get_num_threads() if runtime == "torch" else processors.count()
    return Key(
        runtime=runtime,
        versions=package_versions(_PACKAGES[runtime]),
        device=torch.cuda.get_device_name() if device == "cuda" else capture().cpu,
        threads=threads,
        dtype=precision_of(base, runtime, precision.AUTO),
        quantization=quantization,
        tensor_parallel=tensor_parallel,
        shape=shape_of(read_anatomy(checkpoint.read_config(base))),
    )


def check_request(base: Path, asked: Request) -> None:
    """Refuse a request that `measure` does not support. Raises InputError, MissingRuntime."""
    compressed_tensors.refuse_quantized(base, "timing of blocks")
    if not package_versions(_PACKAGES[asked.runtime]):
        raise MissingRuntime(
            f'runtime {asked.runtime} is not installed; pip install "numprune[cpu]" or, for a GPU, "numprune[gpu]"'
        )
    anatomy = read_anatomy(checkpoint.read_config(base))
    check_measurable(anatomy)
    for scenario in asked.scenarios:
        positions = timed_in(scenario).load().positions
        if positions > anatomy.context:
            raise InputError(
                f"scenario {scenario} needs {positions} positions, and {base} has {anatomy.context}; choose fewer "
                "tokens"
            )
    sizes_to_time(anatomy, asked.target, asked.sizes)
    precision_of(base, asked.runtime, precision.AUTO)


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
        self.anatomy = read_anatomy(self.config)
        self.key = key_of(base, asked.runtime)
        self.runtime = Runtime(asked.runtime, device_of(asked.runtime), self.key.dtype)
        self.sizes = sizes_to_time(self.anatomy, asked.target, asked.sizes)
        self.copies: dict[str, int] = {kind: self._copies(kind) for kind in self.sizes}
        described = {
            "key": self.key.model_dump(),
            "config": self.config.to_dict(),
            "scenarios": [str(scenario) for scenario in asked.scenarios],
            "models": [model.name for model in self.models],
            "seed": asked.seed,
            "code": code_version("serving"),
        }
        identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = scratch / f"{TIMINGS}{identity[:16]}"

    @cached_property
    def models(self) -> list[_Model]:
        return [
            _Model(kind, size, copies)
            for kind, sizes in self.sizes.items()
            for size in sizes
            for copies in (1, self.copies[kind])
        ]

    def _copies(self, kind: Kind) -> int:
        blocks = self.anatomy.of_kind(kind)
        largest = max(block.parameters(block.size) for block in blocks)
        wanted = -(-_COPIES_BYTES // (largest * precision.DTYPES[self.key.dtype].itemsize))
        return min(self.anatomy.layers, max(_FEWEST_COPIES, wanted))

    def complete(self) -> None:
        """Measure what is missing. Raises EnvironmentInvalid."""
        if missing := [self._bytes(model) for model in self.models if not self._place(model).is_dir()]:
            disk.require_room(self.folder, sum(missing) + max(missing))  # one is written before it is exported
        for model in progress(self.models, "timings: write models", "model"):
            self._write(model)
        timed = {str(scenario): timed_in(scenario) for scenario in self.asked.scenarios}
        visits = order([model.name for model in self.models], self.asked.visits, self.asked.seed)
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
        environment = combine(before, after)
        if not environment.valid:
            raise EnvironmentInvalid(f"timings: {'; '.join(environment.reasons)}; {QUIET}")

    def _write(self, model: _Model) -> None:
        """Write a model with random weights in the form that the runtime opens, unless it is there."""
        folder = self._place(model)
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        dtype = precision.DTYPES[self.key.dtype]
        with _temporary(folder) as source:
            random_weights.write_random(source, self._config(model), self.base, dtype, self.asked.seed)
            export_format = exported_as(self.runtime.name, [source], self.key.dtype)
            if export_format is None:
                source.rename(folder)
            else:
                export(source, folder, export_format, dtype=self.key.dtype)

    def _place(self, model: _Model) -> Path:
        return self.folder / "models" / model.name

    def _bytes(self, model: _Model) -> int:
        parameters = self.anatomy.fixed_parameters + model.copies * self._parameters(model)
        return parameters * precision.DTYPES[self.key.dtype].itemsize

    def _parameters(self, model: _Model) -> int:
        return max(block.parameters(model.size) for block in self.anatomy.of_kind(model.kind))

    def _config(self, model: _Model) -> Any:
        """Return the configuration of a model. One layer keeps attention, for the KV cache, in models of MLPs, too."""
        dropped = range(model.copies, self.anatomy.layers)
        left = self.anatomy.without(dropped)
        smallest = min(self.sizes["attention"], key=self._attention_parameters)
        sizes = {}
        for block in left.blocks:
            first = block.kind == "attention" and block.layer == 0
            sizes[block.name] = model.size if block.kind == model.kind else smallest if first else GONE
        return pruned_config(self.config, left.keeping(sizes), dropped=dropped)

    def _attention_parameters(self, size: Size) -> int:
        return self.anatomy.of_kind("attention")[0].parameters(size)

    def _done(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.visit-{number}.json"

    def _anchors(self) -> list[Path]:
        """Return the measurements of the largest model, in the order in which they were made."""
        return sorted(self.folder.glob("anchor-*.json"))

    def _visit_anchor(self, worker: Worker, timed: Mapping[str, Timed], bar: Progress) -> list[Visit]:
        largest = max(self.models, key=lambda model: model.copies * self._parameters(model))
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
            for model in self.models
        }
        return TimingTable(
            key=self.key,
            copies=self.copies,
            visits=self.asked.visits,
            drift=drifts,
            scenarios=[self._times(str(scenario), found) for scenario in self.asked.scenarios],
        )

    def _times(self, scenario: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> ScenarioTimes:
        def of(kind: Kind, size: Size, copies: int) -> list[float]:
            return [one[scenario] for one in found[_Model(kind, size, copies).name]]

        blocks: dict[str, list[BlockTime]] = {}
        for kind, sizes in self.sizes.items():
            copies, blocks[kind] = self.copies[kind], []
            share = 1 / (copies - 1)
            for size in sizes:
                models = [of(kind, size, copies), of(kind, size, 1)]
                time = weighted_medians(models, (share, -share), self.asked.seed)
                ms, interval = _positive(*time, f"{kind} of {size.units}x{size.members} units in {scenario}")
                blocks[kind].append(BlockTime(ms=ms, interval95=interval, units=size.units, members=size.members))
        # A model of one block of attention is that block and what is around it.
        smallest, copies = min(self.sizes["attention"], key=self._attention_parameters), self.copies["attention"]
        weights = (-1 / (copies - 1), copies / (copies - 1))
        models = [of("attention", smallest, copies), of("attention", smallest, 1)]
        time = weighted_medians(models, weights, self.asked.seed)
        ms, interval = _positive(*time, f"embeddings and head in {scenario}")
        return ScenarioTimes(scenario=scenario, around=Time(ms=ms, interval95=interval), blocks=blocks)


def timed_in(scenario: Scenario) -> Timed:
    return Timed(scenario.phase, scenario.batch, scenario.tokens)


def _drift(scenario: str, start: Sequence[Mapping[str, float]], end: Sequence[Mapping[str, float]]) -> float:
    return drift([one[scenario] for one in start], [one[scenario] for one in end])


def _positive(ms: float, interval: tuple[float, float], what: str) -> tuple[float, tuple[float, float]]:
    if ms <= 0:
        raise EnvironmentInvalid(
            f"the machine is too noisy: {what} would take {ms:.3g} ms (95 % interval {interval[0]:.3g} to "
            f"{interval[1]:.3g}); measure again with more visits, which continues this measurement, or larger batches"
        )
    return ms, interval


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Give a name beside `folder` for a model that is only needed until the block ends."""
    source = folder.with_name(f"{folder.name}.source")
    shutil.rmtree(source, ignore_errors=True)  # of a killed run
    manifest.sweep(folder.parent)
    try:
        yield source
    finally:
        shutil.rmtree(source, ignore_errors=True)
