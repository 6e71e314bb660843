"""The checks on a GPU, if there is one; otherwise all of them in miniature, with a bare image's packages."""

import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import numprune
from numprune.flows.studies.gpu import checks, command, parts, sizes, tables
from numprune.flows.studies.gpu.generation import Generation, random_llama
from numprune.flows.studies.gpu.parts import PARTS

ROOT = Path(numprune.__file__).parents[1]
BARE = ("torch", "transformers", "numpy", "scipy", "safetensors", "pydantic", "psutil", "tqdm")
MARKS = {"tensorrt_engine": [pytest.mark.tensorrt]}
CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in checks.CHECKS])
def test_on_a_gpu(name: str) -> None:
    if skipped := checks.CHECKS[name](torch.device("cuda")):
        pytest.skip(skipped)


def test_time_limits_add_up_to_under_eight_minutes() -> None:
    assert sum(part.limit for part in PARTS.values()) < 8 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_gives_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"gpu: error: torch \S+ sees no CUDA device; .* NVIDIA GPU, or .* with --miniature\n", error)
    assert not (tmp_path / "out").exists()


def link_distributions(names: tuple[str, ...], folder: Path) -> None:
    """Link these distributions and what they require into `folder`, and nothing else that is installed."""
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # wanted on another platform, or with an extra
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))).resolve())
        requirements = map(Requirement, found.requires or ())
        waiting += [
            needed.name for needed in requirements if not needed.marker or needed.marker.evaluate({"extra": ""})
        ]


@pytest.mark.slow
def test_in_miniature_on_a_bare_image(tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    venv.create(image, symlinks=True)
    link_distributions(BARE, next(image.glob("lib/python*/site-packages")))
    ended = subprocess.run(
        [image / "bin" / "python", "-m", "numprune.flows.studies.gpu", "--out", str(out), "--miniature"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    (written,) = out.glob("*.json")
    record = json.loads(written.read_text(encoding="utf-8"))
    rows = {name: part["rows"] for name, part in record["parts"].items()}
    assert [row["check"] for row in rows["checks"]] == list(checks.CHECKS)
    skipped = {row["check"]: row["skipped"] for row in rows["checks"] if row["skipped"]}
    assert skipped.pop("tensorrt_engine") == "not installed: onnx, onnxscript, tensorrt"  # the image was bare
    assert skipped.keys() <= {"spread_over_two_gpus"}
    rates = [row["rate"] for row in rows["rates"]]
    assert [rate for rate in rates if rate != "TF32"] == ["float32", "float64", "bfloat16", "memory"]
    assert [row["measured_tokens"] for row in rows["pruning"]] == [64, 128]
    names = [width.name for width in sizes.widths(sizes.MINIATURE)]
    expected = [(name, batch) for name in [*names, "dense again"] for batch in sizes.BATCHES]
    assert [(row["width"], row["batch"]) for row in rows["generation"]] == expected
    if not torch.cuda.is_available():
        assert {row["decode_joules_per_token"] for row in rows["generation"]} == {None}
    text = written.with_suffix(".md").read_text(encoding="utf-8")
    assert text == tables.as_markdown(record)
    assert "Its figures are meaningless" in text
    assert "Incomplete" not in text


def test_output_of_a_stopped_or_failed_part_is_kept() -> None:
    def part(code: str, limit: float = 60) -> tuple[list[dict[str, int]], str | None]:
        found = command.run_limited([sys.executable, "-c", code], limit)
        return found["rows"], found["problem"]

    assert part("print('{\"a\": 1}')") == ([{"a": 1}], None)
    waits = "import time; print('{\"a\": 1}'); print('{\"a\": 2', end='', flush=True); time.sleep(600)"
    assert part(waits, 3) == ([{"a": 1}], "stopped after 3 s")
    assert part("import os; print('{\"a\": 1}', flush=True); os.abort()") == ([{"a": 1}], "ended with exit code -6")
    fails = 'print(\'{"a": 1}\'); print(\'{"error": "OutOfMemoryError: 2 GB"}\'); raise SystemExit(1)'
    assert part(fails) == ([{"a": 1}], "OutOfMemoryError: 2 GB")


def test_tables_report_what_is_missing() -> None:
    part = {"rows": [], "problem": "stopped after 45 s", "seconds": 45.0}
    failed = {"check": "greedy_order", "problem": "AssertionError: a | b", "skipped": None, "seconds": 1.0}
    record = {
        "device": "A GPU",
        "miniature": False,
        "environment": {"valid": False, "reasons": ["A GPU is throttled"]},
        "versions": {"numprune": "0", "torch": "2.11", "transformers": "5", "cuda": "13"},
        "seconds": 90.0,
        "parts": dict.fromkeys(PARTS, part) | {"checks": {**part, "rows": [failed], "problem": None}},
    }
    text = tables.as_markdown(record)
    assert text.count("No results.\n\n**Incomplete: stopped after 45 s**") == len(PARTS) - 1
    assert "| greedy_order | **failed**: AssertionError: a \\| b | 1.0 |" in text
    assert "**Not a valid measurement: A GPU is throttled.**" in text


def test_energy_is_measured_over_at_least_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        """Goes up by 60 J each time it is read."""

        count = 0.0

        def joules(self) -> float:
            self.count += 60
            return self.count

    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(parts, "now", lambda _: next(clock) / 2)
    small = sizes.MINIATURE
    model = random_llama(small, sizes.widths(small)[0], CPU, torch.float32)
    generation = Generation(model, torch.zeros(2, small.prompt, dtype=torch.int64), small.new)
    assert parts._joules(generation, small, CPU, Meter(), 2) == 60 / (2 * small.new)  # one second: one round of steps
    assert parts._joules(generation, small, CPU, None, 2) is None


def test_widths_remove_their_nominal_share() -> None:
    for every in (sizes.LLAMA_3_8B, sizes.MINIATURE):
        dense, *narrower = sizes.widths(every)
        assert (dense.removed, dense.intermediate) == (0, every.layer.intermediate)
        for ratio, aligned, odd in zip(sizes.RATIOS, narrower[::2], narrower[1::2], strict=True):
            assert aligned.intermediate % every.align == 0
            assert odd.intermediate % 2 == 1
            channels = every.align / every.layer.intermediate  # about the share that a step of alignment removes
            assert aligned.removed == pytest.approx(ratio, abs=channels)
            assert odd.removed == pytest.approx(ratio, abs=2 / every.layer.intermediate)
            assert aligned.kv_heads == odd.kv_heads


def test_every_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Generation) -> None:
        self._token.add_(1).remainder_(sizes.MINIATURE.vocabulary)

    monkeypatch.setattr(Generation, "step", broken)
    with pytest.raises(AssertionError, match="dense: other tokens"):
        checks.decoded_as_in_one_pass(CPU)
    monkeypatch.setattr(checks.Moments, "gram", property(lambda self: self._gram.float() * 1.001))
    with pytest.raises(AssertionError, match="is off by"):
        checks.sums_to_float32(CPU)


class OnlyMeta(TorchDispatchMode):
    """Refuses tensors of another device: a CUDA graph can hold no copy from or to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", func
        return out


def test_prefill_and_decoding_do_not_wait_for_the_cpu() -> None:
    """So that a CUDA graph can be captured of each: no value is read on the way, none is brought."""
    small = sizes.MINIATURE
    model = random_llama(small, sizes.widths(small)[0], torch.device("meta"), torch.bfloat16)
    tokens = torch.zeros(2, small.prompt, dtype=torch.int64, device="meta")
    generation = Generation(model, tokens, small.new)
    with OnlyMeta():
        generation.prefill()
        generation.step()
    with pytest.raises(AssertionError), OnlyMeta():
        generation._token.copy_(torch.ones(2, 1))
