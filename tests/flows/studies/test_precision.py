"""The table of precisions, and mistakes that end the study before its work."""

import pytest

from numprune.errors import InputError
from numprune.flows.studies import precision
from numprune.quantization import Scheme


def quality(value: float) -> dict[str, object]:
    delta = {"value": value, "ci95_lower": 0.0, "ci95_upper": 1.0, "interval95": [-0.01, 1.5], "samples": 9}
    return {
        "baseline": {"nll_nats_per_token": 3.0},
        "candidate": {"nll_nats_per_token": 3.0 + value},
        "loss_delta": {**delta, "sampling_unit": "document", "unit": "nats/token"},
    }


def test_the_table_has_a_line_per_model_and_marks_what_was_not_measured() -> None:
    rows = [
        precision.Row("dense", 10_000_000, quality(0.2)),
        precision.Row("pruned", 8_000_000, quality(0.2)),
        precision.Row("w4a16, groups of 64", 3_500_000, quality(0.25)),
    ]
    lines = precision.markdown(rows, ["torch"], "conditions").splitlines()
    assert lines[2] == "| dense | 10.0 | 3.0000 | - | - |"
    assert lines[3] == "| pruned | 8.0 | 3.2000 | +0.2000 [-0.0100, +1.5000] | - |"
    assert lines[4].startswith("| w4a16, groups of 64 | 3.5 | 3.2500 | +0.2500 ")
    assert lines[-1] == "conditions"


def test_scheme_names_include_the_group_size() -> None:
    assert [precision.scheme_of(text) for text in ("w8a8", "w4a16", "w4a16:32")] == [
        Scheme("w8a8"),
        Scheme("w4a16", 128),
        Scheme("w4a16", 32),
    ]
    for text in ("w2a2", "w4a16:x", "w8a8:64"):
        with pytest.raises(InputError, match=r"scheme is|group_size is 64"):
            precision.scheme_of(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runtimes", "tensorrt"], "runtime is 'tensorrt'"),
        (["--schemes", "w2a2"], "scheme is 'w2a2'"),
        (["--schemes", "w4a16:48"], "group_size is 48"),
        (["--runtimes", "vllm", "--vllm", "/nowhere"], "no virtual environment there"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_errors_are_reported_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precision.main(arguments) == 1
    assert said in capsys.readouterr().err
