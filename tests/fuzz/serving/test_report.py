from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numprune.errors import NumpruneError
from numprune.serving import gates
from numprune.serving import report as reports
from tests.fuzz.strangers import NAMES, documents, fuzz, named, written

POLICY = '[[gates]]\nmetric = "quality.tokens"\nbound = "point"\nmin = 1\n'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "report.json"


@fuzz
@given(st.data())
@example(1)
@example(10**400)
def test_a_report_is_read_and_judged_or_refused(path: Path, report_json: Any, data: st.DataObject | int) -> None:
    """Whatever was read can be judged, confirmed, shown and written; and no oddity makes a gate pass."""
    if isinstance(data, int):
        path.write_bytes(written({**report_json, "quality": {**report_json["quality"], "tokens": data}}))
    else:
        path.write_bytes(data.draw(documents(report_json)))
    found = named(reports.read, path)
    if isinstance(found, NumpruneError):
        return
    policy = gates.Policy(gates=(gates.Gate(metric="quality.tokens", bound="point", min=1),))
    verdict = gates.judge(found, policy)
    if verdict.outcome == "pass":
        assert found.quality is not None
        assert found.quality.tokens >= 1
    named(gates.confirm, found)
    reports.markdown(found)
    reports.write(found, path.with_name("again.json"))
    named(reports.read, path.with_name("again.json"))


VALUES = [
    "0x" + "f" * 5000,
    "9" * 5000,
    "1e999",
    "nan",
    "1",
    "0.5",
    "true",
    "[]",
    "{}",
    "[" * 5000,
    '"point"',
    '"ci95_upper"',
]
VALUES += ['"quality.tokens"', '"speed.torch.ttft.ratio"', "2026-11-21", *(f"'{name}'" for name in NAMES)]


@fuzz
@given(
    st.dictionaries(st.sampled_from(["metric", "bound", "min", "max", "x"]), st.sampled_from(VALUES)).map(
        lambda gate: "\n".join(["[[gates]]", *(f"{key} = {value}" for key, value in gate.items())]).encode(
            errors="surrogatepass"
        )
    )
    | st.binary(max_size=60)
)
@example(b"gates = " + b"[" * 100_000)
@example(POLICY.replace("min = 1", "min = 0x" + "f" * 5000).encode())
@example(POLICY.replace('"point"', "0x" + "f" * 5000).encode())
def test_a_policy_is_read_or_refused(path: Path, content: bytes) -> None:
    policy = path.with_name("policy.toml")
    policy.write_bytes(content)
    named(gates.read_policy, policy)


@pytest.mark.parametrize("read", [reports.read, gates.read_policy])
def test_oversized_files_are_not_read(path: Path, read: Any) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(read, path))
