"""The file of a policy."""

from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.serving.gates import read_policy
from tests.serving.judging import NLL


def test_a_policy_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        '[[gates]]\nmetric = "quality.loss_delta"\nbound = "ci95_upper"\nmax = 0.10\n'
        '[[gates]]\nmetric = "sizes.parameters.ratio"\nbound = "point"\nmax = 1\n'
    )
    policy = read_policy(path)
    assert [(gate.metric, gate.bound, gate.min, gate.max) for gate in policy.gates] == [
        (NLL, "ci95_upper", None, 0.10),
        ("sizes.parameters.ratio", "point", None, 1.0),
    ]


GOOD = 'metric = "sizes.parameters.ratio"\nbound = "point"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "gates: missing"),
        ("gates = []", "gates = .*at least one"),
        ("[gates]", "gates"),
        ("[[gate]]\n" + GOOD + "max = 1.0", "gate: unknown; the valid ones are gates"),
        ("[[gates]]\n" + GOOD, "gates.0 = .*: give either min or max"),
        ("[[gates]]\n" + GOOD + "min = 0.1\nmax = 1.0", "gates.0 = .*: give either min or max"),
        ("[[gates]]\n" + GOOD + "max = nan", r"gates.0.max = .*finite"),
        ("[[gates]]\n" + GOOD + "max = inf", r"gates.0.max = .*finite"),
        ("[[gates]]\n" + GOOD + 'max = "0.1"', r"gates.0.max = '0.1': .*number"),
        ("[[gates]]\n" + GOOD + "max = true", r"gates.0.max = True: .*number"),
        ("[[gates]]\n" + GOOD + "max = 0.1\nmaximum = 0.1", "gates.0.maximum: unknown"),
        (
            '[[gates]]\nmetric = "a.b"\nbound = "upper"\nmax = 0.1',
            r"gates.0.bound = 'upper': must be .*; did you mean 'ci95_upper'",
        ),
        (
            '[[gates]]\nmetric = "a.b"\nmax = 0.1',
            "gates.0.bound: missing; must be one of point, ci95_lower, ci95_upper",
        ),
        ('[[gates]]\nmetric = "a..b"\nbound = "point"\nmax = 0.1', "gates.0.metric"),
        ('[[gates]]\nmetric = "a.b"\nbound = "ci95_upper"\nmin = 0.1', "rises with noise"),
        ('[[gates]]\nmetric = "a.b"\nbound = "ci95_lower"\nmax = 0.1', "falls with noise"),
        ("[[gates]\n", "not TOML"),
    ],
)
def test_an_invalid_policy_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"(?s)policy .*policy.toml: .*{message}"):
        read_policy(path)


def test_every_problem_of_a_policy_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[[gates]]\nmetric = "a"\nbound = "x"\nmax = "y"\n[[gates]]\nbound = "point"\nmin = 1.0')
    with pytest.raises(InputError) as caught:
        read_policy(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"policy {path}: 4 problems"
    assert [line.split()[0].rstrip(":") for line in lines] == [
        *("gates.0.metric", "gates.0.bound", "gates.0.max", "gates.1.metric")
    ]


def test_a_missing_or_binary_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"policy\.toml: no such file"):
        read_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not TOML"):
        read_policy(tmp_path / "policy.toml")
