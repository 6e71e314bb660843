"""The parent's side of `bench`: runs `vllm bench serve` against any side at any concurrency of the load."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from numprune.serving.benchmark.client import Worker, start_worker
from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.requests import Requests, read_requests
from numprune.serving.benchmark.vllm.side import Side
from numprune.serving.energy import EnergyMeter, start_counting
from numprune.serving.vllm.environment import Environment

_SCRIPT = Path(__file__).with_name("bench.py")
_ANSWER_S = 1800.0  # one run, or importing vLLM


@dataclass(frozen=True)
class Bench:
    """Runs the load; `tokenizer` is a checkpoint's, from which all prompts are drawn; `energy` of the servers' GPU."""

    worker: Worker
    tokenizer: Path
    scratch: Path
    load: ServedLoad
    energy: EnergyMeter | None = None

    def run(self, side: Side, concurrency: int) -> Requests:
        """The load once. Raises IntegrityError, ServerError, WorkerError."""
        result = self.scratch / "result.json"
        result.unlink(missing_ok=True)
        before, joules = side.threads(), start_counting(self.energy)
        self.worker.ask("bench", arguments=self._arguments(side, concurrency, result))
        taken = joules()
        side.server.require_alive()
        return replace(read_requests(result, self.load, concurrency, side.threads() - before), joules=taken)

    def _arguments(self, side: Side, concurrency: int, result: Path) -> list[str]:
        load = self.load
        return [
            *("--backend", "openai", "--endpoint", "/v1/completions", "--base-url", side.server.url),
            *("--model", side.name, "--tokenizer", str(self.tokenizer.absolute())),
            # The only vLLM dataset that sends token ids, so that prompts have exactly the requested length.
            *("--dataset-name", "timed_trace", "--dataset-path", str(self.scratch / "trace.jsonl")),
            *("--no-self-timed", "--timed-trace-chunk-hash-size", str(load.prompt_length)),
            *("--num-prompts", str(load.requests(concurrency)), "--max-concurrency", str(concurrency)),
            *("--ignore-eos", "--temperature", "0", "--seed", str(load.seed), "--ready-check-timeout-sec", "0"),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"),
            *("--goodput", f"ttft:{load.goodput_ttft_ms}", f"tpot:{load.goodput_tpot_ms}"),
            *("--save-result", "--save-detailed", "--result-dir", str(result.parent)),
            *("--result-filename", result.name),
        ]


@contextmanager
def start_bench(
    environment: Environment, tokenizer: Path, load: ServedLoad, energy: EnergyMeter | None = None
) -> Iterator[Bench]:
    """Start it in the background: importing vLLM takes as long as starting a server. The first run waits for it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # The trace's prompts depend on Python's string hash, which without PYTHONHASHSEED differs between processes.
    variables |= {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="numprune-bench-") as scratch:
        trace = Path(scratch) / "trace.jsonl"
        trace.write_text(load.trace(), encoding="utf-8")
        with start_worker("vllm bench serve", _ANSWER_S, [environment.python, "-P", _SCRIPT], variables) as worker:
            yield Bench(worker, tokenizer, Path(scratch), load, energy)
