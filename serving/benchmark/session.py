"""The state of a worker: one loaded model, and the load that it runs repeatedly."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

import numprune.export.checkpoint  # noqa: F401 - slow: now, while the other worker starts too, not within `load`
from numprune.errors import MissingRuntime
from numprune.export.precision import FLOAT32
from numprune.export.runtimes import Runtime, open_runtime
from numprune.export.runtimes.encoder import Encoder, open_encoder
from numprune.export.runtimes.torch_compiled import CompiledRuntime
from numprune.export.runtimes.torch_eager import TorchRuntime
from numprune.serving.benchmark.encoding import encode
from numprune.serving.benchmark.generation import generate
from numprune.serving.benchmark.memory import Peak, PeakCounted, PeakMissing, PeakResident, resident_bytes
from numprune.serving.benchmark.passes import Pass
from numprune.serving.benchmark.samples import Generation
from numprune.serving.benchmark.scheduler import thread_times
from numprune.serving.energy import EnergyMeter, open_meter, start_counting

Answer = dict[str, Any]  # plain JSON


class Session:
    """One side of a benchmark: `load`, optionally `compile`, `prepare`, any number of `repeat`, `finish`."""

    def __init__(self) -> None:
        self._runtime: Runtime | Encoder
        self._energy: EnergyMeter | None
        self._facts: Answer  # further facts of the description
        self._peak: Peak | None  # None: on a GPU that torch does not see, so its memory cannot be read
        self._work: Callable[[], Sequence[Generation | Pass]]

    @property
    def operations(self) -> Mapping[str, Callable[..., Answer]]:
        """The available operations by name."""
        return {
            "load": self.load,
            "compile": self.compile,
            "decode_eagerly": self.decode_eagerly,
            "prepare": self.prepare,
            "prepare_passes": self.prepare_passes,
            "repeat": self.repeat,
            "finish": self.finish,
        }

    def load(
        self, folder: str, runtime: str, device: str, threads: int | None, dtype: str = FLOAT32, encoder: bool = False
    ) -> Answer:
        """Load the model, a decoder or an encoder, in place of an earlier one. Raises what `open_runtime` does."""
        self._release()
        opening = open_encoder if encoder else open_runtime
        before = resident_bytes()
        resident = PeakResident()
        on_gpu = _watch_gpu(runtime) if device != "cpu" and torch.cuda.is_available() else None
        started = perf_counter()
        self._runtime = opening(runtime, Path(folder), device=device, threads=threads, dtype=dtype)
        seconds = perf_counter() - started

        gpu = self._runtime.describe()["device"] != "cpu"
        self._energy, energy = (None, "") if encoder else open_meter(on_gpu=gpu)
        if self._energy and isinstance(self._runtime, TorchRuntime) and self._runtime.is_spread:
            self._energy, energy = None, "not measured: the model is spread over several GPUs"
        self._facts = {"energy": energy} if energy else {}
        description = self._describe()
        self._peak = on_gpu if gpu else resident
        return {
            "vocabulary": self._runtime.vocabulary,
            "description": description,
            "gpu": gpu,
            "weight_bytes": description["weight_bytes"],
            "kv_bytes_per_token": description.get("kv_bytes_per_token"),
            "load_s": seconds,
            "resident_bytes_before_load": before,
            "resident_bytes_loaded": resident_bytes(),
            "peak_bytes_load": None if self._peak is None else self._peak.bytes(),
            "peak_method": None if self._peak is None else self._peak.method,
        }

    def _release(self) -> None:
        """Free an earlier model, which `_begin` has hidden from the garbage collector."""
        for held in ("_runtime", "_work"):
            self.__dict__.pop(held, None)
        gc.unfreeze()
        gc.collect()

    def _describe(self) -> Answer:
        return {**self._runtime.describe(), **self._facts}

    def compile(self, rows: int, positions: int) -> Answer:
        """Switch to compiled decoding; returns `description`, and `reason` if decoding stays eager."""
        assert isinstance(self._runtime, TorchRuntime)
        try:
            self._runtime = CompiledRuntime(self._runtime, rows, positions)
        except MissingRuntime as error:
            return {"description": self._describe(), "reason": str(error)}
        return {"description": self._describe(), "reason": None}

    def decode_eagerly(self, reason: str) -> Answer:
        """Undo `compile`, because the other side could not be compiled."""
        if isinstance(self._runtime, CompiledRuntime):
            self._runtime = self._runtime.eager
        return {"description": {**self._describe(), "not_compiled": reason}}

    def prepare(self, token_ids: list[list[int]], batch_size: int, output_length: int) -> Answer:
        """Accept the load of a decoder; the peak of the run is measured from here."""
        prompts, runtime = torch.tensor(token_ids, dtype=torch.int64).split(batch_size), cast(Runtime, self._runtime)
        return self._begin(lambda: [generate(runtime, batch, output_length) for batch in prompts])

    def prepare_passes(
        self, batches: list[list[list[int]]], passes: int, images: Sequence[int] = (), seed: int = 0
    ) -> Answer:
        """Accept the load of an encoder: token ids, or random images in batches of these sizes.

        The peak of the run is measured from here.
        """
        encoder, generator = cast(Encoder, self._runtime), torch.Generator().manual_seed(seed)
        inputs = [torch.tensor(batch, dtype=torch.int64) for batch in batches]
        if encoder.image is not None:
            inputs = [torch.randn(size, *encoder.image, generator=generator) for size in images]
        return self._begin(lambda: encode(encoder, inputs, passes))

    def _begin(self, work: Callable[[], Sequence[Generation | Pass]]) -> Answer:
        self._work = work
        # Otherwise every full garbage collection during a timing would traverse the imported modules.
        gc.collect()
        gc.freeze()
        if self._peak is not None:
            self._peak.restart()
        return {}

    def repeat(self) -> Answer:
        """Run the whole load once; returns the timings of each batch and our threads' scheduling times."""
        before, joules = thread_times(), start_counting(self._energy)
        batches = [asdict(batch) for batch in self._work()]
        return {
            "batches": batches,
            "threads": asdict(thread_times() - before),
            "joules": joules(),
        }

    def finish(self) -> Answer:
        """The peak memory since `prepare`."""
        return {"peak_bytes_run": None if self._peak is None else self._peak.bytes()}


def _watch_gpu(runtime: str) -> Peak:
    return PeakCounted() if runtime == "torch" else PeakMissing()
