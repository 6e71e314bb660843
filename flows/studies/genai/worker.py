"""The process that runs one contender: `python -m numprune.flows.studies.genai.worker PARENT_PID`.

Its protocol is that of `numprune.serving.benchmark.worker`.
"""

import faulthandler
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from numprune.serving.benchmark.worker import die_with, reserve_stdout


class TorchLike:
    """A model in one of numprune's runtimes."""

    def __init__(self, program: str, folder: Path, threads: int) -> None:
        from numprune.export.runtimes import open_runtime

        self._runtime = open_runtime(program, folder, device="cpu", threads=threads)

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Return the median seconds per token of `steps` greedily generated tokens."""
        import torch

        from numprune.serving.benchmark.generation import generate

        return median(generate(self._runtime, torch.tensor([prompt]), steps + 1).itl_ms) / 1e3

    def nll(self, rows: Sequence[Sequence[int]]) -> float:
        """Return the mean NLL of all tokens except each row's first; tokens are fed one by one."""
        import torch
        from torch.nn.functional import cross_entropy

        tokens = torch.tensor(rows)
        logits = [self._runtime.prefill(tokens[:, :1], last_only=True)[:, 0]]
        logits += [self._runtime.decode(tokens[:, place : place + 1]) for place in range(1, tokens.shape[1] - 1)]
        return float(cross_entropy(torch.stack(logits, 1).flatten(0, 1), tokens[:, 1:].flatten()))


class Genai:
    """A folder in onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self._package = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        generator = self._generator(len(prompt) + steps + 1)
        generator.append_tokens(list(prompt))
        generator.generate_next_token()
        seconds = []
        for _ in range(steps):
            start = perf_counter()
            generator.generate_next_token()
            seconds.append(perf_counter() - start)
        return median(seconds)

    def nll(self, rows: Sequence[Sequence[int]]) -> float:
        import torch
        from torch.nn.functional import cross_entropy

        logits = []
        for row in rows:
            generator = self._generator(len(row))
            for token in row[:-1]:
                generator.append_tokens([token])
                logits.append(torch.from_numpy(generator.get_logits()).float().flatten())
        targets = torch.tensor([token for row in rows for token in row[1:]])
        return float(cross_entropy(torch.stack(logits), targets))

    def _generator(self, length: int) -> Any:
        settings = self._package.GeneratorParams(self._model)
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self._package.Generator(self._model, settings)


def main() -> None:
    """Handle requests until stdin closes: `load`, then the methods of the contender's class."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(int(sys.argv[1]))
    answers = reserve_stdout()
    operations: dict[str, Callable[..., float]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("operation")
        if operation == "load":
            program, folder, threads = request["program"], Path(request["folder"]), request["threads"]
            opened = Genai(folder, threads) if program == "onnxruntime-genai" else TorchLike(program, folder, threads)
            operations = {"decode": opened.decode, "nll": opened.nll}
            answer = None
        else:
            answer = operations[operation](**request)
        answers.write(json.dumps({"ok": answer}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
