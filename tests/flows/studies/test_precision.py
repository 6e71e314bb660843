"""The table of precisions, its comparisons, and errors reported before any work."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.flows.studies import precision
from numprune.quantization import Scheme
from tests.serving.conftest import COMPLETE


def delta(value: float) -> dict[str, object]:
    return {
        "value": value,
        "ci95_lower": 0.0,
        "ci95_upper": 1.0,
        "interval95": [-0.01, 1.5],
        "samples": 9,
        "sampling_unit": "document",
        "unit": "nats/token",
    }


def quality(value: float) -> dict[str, object]:
    sides = {"baseline": {"nll_nats_per_token": 3.0}, "candidate": {"nll_nats_per_token": 3.0 + value}}
    return {**sides, "loss_delta": delta(value)}


def test_the_table_has_a_line_per_model_and_marks_what_was_not_measured() -> None:
    rows = [
        precision.Row("dense", 10_000_000, quality(0.2)),
        precision.Row("pruned", 8_000_000, quality(0.2)),
        precision.Row("pruned, w4a16", 3_500_000, quality(0.25), quantization=delta(0.05)),
    ]
    lines = precision.markdown(rows, ["torch"], "conditions").splitlines()
    assert lines[2] == "| dense | 10.0 | 3.0000 | - | - | - |"
    assert lines[3] == "| pruned | 8.0 | 3.2000 | +0.2000 [-0.0100, +1.5000] | - | - |"
    assert lines[4] == (
        "| pruned, w4a16 | 3.5 | 3.2500 | +0.2500 [-0.0100, +1.5000] | +0.0500 [-0.0100, +1.5000] | - |"
    )
    assert lines[-1] == "conditions"


def test_rates_are_compared_only_within_their_comparison() -> None:
    speed = COMPLETE["speed"]["onnxruntime"]
    slower = copy.deepcopy(speed)  # the machine was half as fast for both sides
    for side in ("baseline", "candidate"):
        slower[side]["decode_tokens_per_s"] /= 2
    rows = [
        precision.Row("dense", 10_000_000, quality(0.2)),
        precision.Row("pruned", 8_000_000, quality(0.2), speed={"onnxruntime": speed}),
        precision.Row("pruned, w8a8", 4_000_000, quality(0.2), speed={"onnxruntime": slower}),
    ]
    dense, *others = (line.split(" | ")[-1] for line in precision.markdown(rows, ["onnxruntime"], "").splitlines()[2:5])
    assert dense == f"{0.75 * speed['baseline']['decode_tokens_per_s']:,.1f} tokens/s |"
    ratio = speed["decode_tokens_per_s"]["ratio"]
    assert others[0] == others[1]
    assert others[0].startswith(f"{ratio['value']:.2f} [")


def test_scheme_names_include_the_group_size() -> None:
    assert [precision.scheme_of(text) for text in ("w8a8", "w4a16", "w4a16:32")] == [
        Scheme("w8a8"),
        Scheme("w4a16", 128),
        Scheme("w4a16", 32),
    ]
    for text in ("w2a2", "w4a16:x", "w8a8:64"):
        with pytest.raises(InputError, match=r"scheme is|group_size is 64"):
            precision.scheme_of(text)


def test_the_cost_of_quantization_is_the_difference_from_the_same_model_before_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base, pruned = tiny_checkpoint(), tiny_checkpoint(intermediate_size=64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(250, (12, 64), generator=generator)
    heldout = TokenRows([*rows], [row // 2 for row in range(12)], [*"abcdef"], "")
    variants = []
    for name, folder in ((precision.DENSE, base), (precision.PRUNED, pruned)):
        variants.append(precision.Variant(name, None, folder))
        for scheme in (Scheme("w8a8"), Scheme("w4a16", 32)):
            variants.append(precision.Variant(name, scheme, tmp_path / f"quantized-{len(variants)}"))
            quantize_checkpoint(folder, scheme, variants[-1].folder, torch.device("cpu"))
    quality, cost = precision._quality(variants, heldout)
    nll = {name: found["candidate"]["nll_nats_per_token"] for name, found in quality.items()}
    nll["dense"] = quality["dense"]["baseline"]["nll_nats_per_token"]
    assert list(nll) == [one.name for one in variants]
    for model in ("dense", "pruned"):
        for scheme in ("w8a8", "w4a16, groups of 32"):
            change = nll[f"{model}, {scheme}"] - nll[model]
            assert cost[f"{model}, {scheme}"]["value"] == pytest.approx(change, abs=1e-6)
    assert cost.keys() == nll.keys() - {"dense", "pruned"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runtimes", "tensorrt"], "runtime is 'tensorrt'"),
        (["--schemes", "w2a2"], "scheme is 'w2a2'"),
        (["--schemes", "w4a16:48"], "group_size is 48"),
        (["--schemes", "w4a16,w8a8,w4a16:128"], "--schemes: w4a16, groups of 128 is given twice"),
        (["--runtimes", "torch,torch"], "--runtimes: torch is given twice"),
        (["--repeats", "2"], "--repeats is 2; it must be an even number, at least 4"),
        (["--runtimes", "vllm", "--vllm", "/nowhere"], "no virtual environment there"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_errors_are_reported_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precision.main(arguments) == 1
    assert said in capsys.readouterr().err
