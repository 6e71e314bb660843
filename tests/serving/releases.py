"""Releases as `optimize` makes them, of small random models, without pruning or measuring anything."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.errors import MissingRuntime
from numprune.export import manifest, vllm
from numprune.flows.steps import reference_answers as making
from numprune.serving import registry
from numprune.serving.gates import Gate, Policy, judge
from numprune.serving.registry import Version
from numprune.serving.report import Report, markdown, write
from numprune.serving.vllm import environment
from numprune.serving.vllm.environment import Environment
from tests.conftest import build_tiny, byte_tokenizer
from tests.serving.conftest import COMPLETE

# Short contexts, little memory and no compilation: a server starts in the time that its imports take.
SMALL = ("--enforce-eager", "--max-model-len", "128", "--kv-cache-memory-bytes", str(16 << 20))

# Sizes that vLLM's kernels for CPUs know.
SERVED = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_checkpoint(folder: Path, seed: int = 0, **config: int) -> Path:
    """A random Llama in float32 and a byte tokenizer."""
    build_tiny("llama", seed, **{**SERVED, **config}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_release(
    checkpoint: Path,
    folder: Path,
    change: Callable[[Path], object] = lambda _: None,
    *,
    unquantized: Path | None = None,
) -> Path:
    """The folder of a release with a passed verdict.

    Args:
        folder: to be made.
        change: spoils the exported checkpoint before its digests are taken; the reference stays that of a good one.
        unquantized: what a quantized checkpoint was made from.
    """
    parts = folder.with_name(f"{folder.name} parts")
    vllm.export(checkpoint, parts / "good")
    good = manifest.read(parts / "good")
    with manifest.creating(parts / "checkpoint", kind=good.kind, parents=good.parents, facts=good.facts) as partial:
        shutil.copytree(parts / "good", partial, dirs_exist_ok=True)
        (partial / manifest.FILE_NAME).unlink()
        change(partial)
    candidate = manifest.read(parts / "checkpoint").digest
    data = copy.deepcopy(COMPLETE)
    data["identity"] |= {"candidate": candidate, "exports": {}}
    report = Report.model_validate(data)
    policy = Policy(gates=(Gate(metric="sizes.parameters.ratio", bound="point", max=0.8),))
    judged = report.judged(judge(report, policy))
    with manifest.creating(folder, kind="release", parents={"checkpoint": candidate}) as release:
        shutil.copytree(parts / "checkpoint", release / "checkpoint")
        write(judged, release / "report.json")
        (release / "report.md").write_text(markdown(judged))
        making.answers_of(parts / "good", unquantized=unquantized).write(release)
    return folder


def publish(release: Path, workspace: Path, name: str, *, promote: bool = True) -> Version:
    opened = registry.open_registry(None, workspace)
    version = registry.publish(opened, release, name)
    return registry.promote(opened, version.reference) if promote else version


def require_vllm() -> Environment:
    """vLLM's environment; the test is skipped where none is meant to be."""
    try:
        return environment.find()
    except MissingRuntime as error:
        if environment.VARIABLE in os.environ:
            raise
        pytest.skip(str(error))
