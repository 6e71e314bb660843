import json
from pathlib import Path

import pytest

from numprune.flows.studies import bits

TEXT = Path(bits.__file__).read_text(encoding="utf-8") * 3
WAYS = ["units", "bits", "units and bits"]


@pytest.mark.slow
def test_every_way_keeps_to_the_rivals_bytes_and_choosing_both_costs_least(tiny_checkpoint, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    base = tiny_checkpoint(hidden_size=64, intermediate_size=96, head_dim=32)
    rivals = {"w8a8": "w8a8 of the dense model", "w4a16@0.3": "30% pruned, then w4a16"}
    options = ["--samples", "8", "--sequence-length", "32", "--windows", "40", "--rivals", ",".join(rivals), "--json"]
    assert bits.main([str(base), "--text", str(text), "--heldout", str(text), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    rows, conditions = found["rows"], found["conditions"]
    assert [row["what"] for row in rows] == [what for name in rivals.values() for what in (name, *WAYS)]
    for name in rivals.values():
        rival, *others = (row for row in rows if row["budget_of"] == name)
        reached = [row for row in others if not row["problem"]]
        assert all(row["bytes"] <= rival["bytes"] for row in reached)
        both = others[-1]
        assert both["price"] == min(row["price"] for row in (rival, *reached))
        assert rival["interval95"][0] <= rival["nll_delta"] <= rival["interval95"][1]
    dense = rows[0]
    assert (dense["parameters"], dense["blocks"]) == (1, {"16": 0, "8": 4, "4": 0})
    *table, empty, last = bits.as_markdown(rows, conditions).splitlines()
    assert (empty, last) == ("", conditions)
    assert " on 8 rows of 32 tokens; " in conditions
    assert f" on {40 * 31:,} tokens of 1 document held out. " in conditions
    assert {line.count("|") for line in table} == {table[0].count("|")}


@pytest.mark.parametrize("rivals", ["fp8", "w8a8@1", "w4a16@x"])
def test_other_rivals_are_refused(rivals: str, capsys) -> None:
    assert bits.main(["--rivals", f"w8a8,{rivals}"]) == 1
    assert f"--rivals: {rivals!r} must be w8a8 or w4a16" in capsys.readouterr().err


def test_a_rival_is_named_once(capsys) -> None:
    assert bits.main(["--rivals", "w8a8,w4a16@0.2,w8a8@0.0"]) == 1
    assert "--rivals: w8a8@0 is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--samples", "--sequence-length", "--windows"])
def test_no_rows_are_refused(option: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        bits.main([option, "0"])
    assert f"argument {option}: 0 must be at least 1" in capsys.readouterr().err
