import json
from pathlib import Path

import numpy as np
import pytest

from numprune.bootstrap import bootstrap_mean
from numprune.flows.studies import milliseconds
from numprune.flows.studies.milliseconds import gain, rival_ms
from numprune.tasks import Comparison
from tests.flows.timing import DECODE, ignore_noise, write_table

SLOWER = 1e3  # than this machine is that of the table, so every budget is met
SCORED = np.array([40, 10, 20])


def lost(*by_document: float) -> Comparison:
    sums = np.array(by_document) * SCORED
    found = bootstrap_mean(sums, SCORED, "document")
    return Comparison("causal-lm", "nats/token", len(SCORED), None, None, sums, SCORED, found, {})


def test_the_rival_is_between_the_models_of_less_and_of_more_loss() -> None:
    ms = {"dense": [10.0, 10.0, 10.0], "a third": [8.0, 8.0, 8.0], "half": [5.0, 5.0, 5.0], "mine": [6.0, 6.0, 6.0]}
    losses = {"a third": lost(0.1, 0.1, 0.1), "half": lost(0.3, 0.3, 0.3), "mine": lost(0.15, 0.15, 0.15)}
    between = (0.15**0.5 - 0.1**0.5) / (0.3**0.5 - 0.1**0.5)  # of the square root of the loss
    assert gain("mine", ["dense", "a third", "half"], ms, losses) == pytest.approx(((8 - 3 * between) / 6,) * 3)
    losses["mine"] = lost(0.05, 0.05, 0.05)
    assert gain("mine", ["dense", "a third", "half"], ms, losses) == pytest.approx(((10 - 2 * 0.5**0.5) / 6,) * 3)


def test_a_rival_that_is_better_and_faster_replaces_the_others() -> None:
    assert rival_ms(0.1, np.array([0.0, 0.2, 0.1]), np.array([10.0, 9.0, 8.0])) == pytest.approx(8)
    assert rival_ms(0.2, np.array([0.0, 0.2, 0.4]), np.array([10.0, 8.0, 9.0])) == pytest.approx(8)
    assert np.isnan(rival_ms(0.3, np.array([0.0, 0.2]), np.array([10.0, 8.0])))


def test_the_interval_is_of_visits_and_documents() -> None:
    losses = {"half": lost(0.4, 0.2, 0.3), "mine": lost(0.2, 0.1, 0.2)}
    steady = {"dense": [10.0] * 3, "half": [5.0] * 3, "mine": [6.0] * 3}
    value, low, high = gain("mine", ["dense", "half"], steady, losses) or (0.0, 0.0, 0.0)
    assert low < value < high
    wide = gain("mine", ["dense", "half"], steady | {"mine": [4.0, 6.0, 8.0]}, losses)
    assert wide is not None
    assert wide[1] < low < high < wide[2]


def test_no_rival_is_beyond_the_last_ratio() -> None:
    ms = {"dense": [10.0] * 3, "half": [5.0] * 3, "mine": [6.0] * 3}
    losses = {"half": lost(0.3, 0.3, 0.3), "mine": lost(0.4, 0.4, 0.4)}
    assert gain("mine", ["dense", "half"], ms, losses) is None


@pytest.mark.slow
def test_budgets_are_compared_with_ratios_of_as_many_parameters(
    tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_noise(monkeypatch)
    base, text = tiny_checkpoint(), tmp_path / "text.txt"
    text.write_text(Path(milliseconds.__file__).read_text(encoding="utf-8") * 2, encoding="utf-8")
    whole = write_table(base, tmp_path / "table.json", SLOWER, scenario="request,b=1,len=8,out=4")
    limit = float(f"{0.8 * whole:.6g}")
    texts = ["--calibration", str(text), "--heldout", str(text), "--samples", "8", "--sequence-length", "32"]
    asked = ["--timings", str(tmp_path / "table.json"), "--limits", str(limit), "--ratios", "0.2,0.6", "--visits", "3"]
    assert milliseconds.main([str(base), *asked, *texts, "--windows", "16", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "milliseconds.md").read_text() == table
    found = json.loads((tmp_path / "out" / "milliseconds.json").read_text())
    by_name = {row["name"]: row for row in found["rows"]}
    row = by_name[f"{limit:g} ms"]
    assert row["predicted"][0] <= limit
    assert row["corrections"] == 0
    equal = by_name[f"ratio, parameters of {limit:g} ms"]
    assert equal["removed"] == pytest.approx(row["removed"], abs=0.05)
    assert equal["predicted"] is equal["gain"] is None
    assert by_name["ratio 0.6"]["kl"] > by_name["ratio 0.2"]["kl"] > 0
    assert found["visits"].keys() == by_name.keys()
    assert [row["removed"] for row in found["rows"]] == sorted(row["removed"] for row in found["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limits", "fast"], "--limits: 'fast' must be numbers, separated by commas"),
        (["--ratios", "0.2,0.2"], "--ratios: 0.2 is given twice"),
        (["--scenario", "decode,b=2,ctx=16"], f"decode,b=2,ctx=16 was not measured; measured are {DECODE}"),
        (["--limits", "0.001"], "the quickest measured size of every block"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_first(
    tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    base = tiny_checkpoint()
    write_table(base, tmp_path / "table.json", SLOWER)
    assert milliseconds.main([str(base), "--timings", str(tmp_path / "table.json"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "pruning: " not in error
