import json
import re

import pytest
import torch

from numprune.criteria.numerical import error_matrix, relaxed_mask
from numprune.criteria.obs import greedy_removal
from numprune.flows.studies.speed import clock, straightforward
from numprune.flows.studies.speed.command import main
from numprune.moments import Moments

TINY = ["--channels", "12,20", "--layer", "32x48x4x2", "--tokens", "256", "--sequence-length", "16", "--device", "cpu"]


def result(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def test_the_published_algorithms_give_the_same_results():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 30, generator=generator)
    weight = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    moments = Moments(30)
    moments.add(x)
    gram = result(straightforward.gram(x.split(40)))
    torch.testing.assert_close(gram, moments.gram, rtol=1e-6, atol=1e-6)

    A = error_matrix(weight, gram)
    torch.testing.assert_close(result(straightforward.newton(A, 0.3, 10.0)), relaxed_mask(A, 0.3, 10.0, ridge=0))

    order, costs = result(straightforward.removal(weight, gram))
    expected_order, expected_costs = greedy_removal(weight, gram, 1)
    assert order.tolist() == expected_order.tolist()
    torch.testing.assert_close(costs, expected_costs, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("patience", "seconds", "share"),
    [
        (100, 5 + 1 + 1 + 4, 1.0),  # run to its end: what it took
        (6.5, 5 + (2 / 2) * 3, 0.75),
        (0, 5 + 1 * 3, 0.5),  # the first step, which prepared something, is not taken for the others
    ],
)
def test_slow_work_is_stopped_and_extrapolated(monkeypatch, patience, seconds, share):
    times = iter([0.0, 5.0, 6.0, 7.0, 11.0])
    monkeypatch.setattr(clock, "now", lambda _device: next(times))
    work = (None for _ in range(4))
    assert clock.seconds_of_steps(work, 4, patience, torch.device("cpu")) == (seconds, share)


def test_tables_cover_every_part_at_every_size_and_a_layer(capsys):
    assert main([*TINY, "--measured-tokens", "100", "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index("| part | channels | as published, s | numprune, s | times faster |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[head + 2 : head + 10]]
    assert [int(row[1]) for row in rows] == [12] * 4 + [20] * 4
    assert [row[0] for row in rows[:4]] == [row[0] for row in rows[4:]]
    for row in rows:
        printed, ours, faster = (float(cell) for cell in row[2:])
        assert printed / ours == pytest.approx(faster, rel=0.02)
    row = re.compile(r"^\| (\S.*?) \| (\d[\d.e+-]*) \| (\d[\d.e+-]*) \|$", re.M)
    layer = {name: (float(time), float(ratio)) for name, time, ratio in row.findall("\n".join(lines))}
    forward = layer["forward"]
    assert forward[1] == 1
    once = ("score", "least squares")
    prefix = ("sums with targets", "damping", *once)
    wholes = {
        "oneshot": (["forward"], ["sums", *once]),
        "residual": (["forward", "to the consumer", "consumer"], prefix),
        "joint": (["forward", "to the consumer"], [*prefix, "producers"]),
        "split": (["forward"] * 2, ["sums", "score"]),
    }
    for name, (passes, parts) in wholes.items():
        besides = sum(layer[part][0] for part in parts)
        whole = besides + sum(layer[part][0] for part in passes)
        for title, expected in (("all but forward passes", besides), ("whole", whole)):
            total, ratio = layer[f"**{title}, `{name}`**"]
            assert total == pytest.approx(expected, rel=0.03)
            assert ratio == pytest.approx(total / forward[0], rel=0.03)
    # 6 rows of 16 tokens were run of 256 tokens.
    assert any("measured for 96 and multiplied by 2.66667" in line for line in lines)


def test_json_matches_the_tables_and_records_the_conditions(capsys):
    assert main([*TINY, "--repeats", "1", "--patience", "0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["environment"]["torch"] == torch.__version__
    greedy = [part for part in record["parts"] if part["name"] == "greedy OBS"]
    assert [(part["channels"], part["share_run"]) for part in greedy] == [(12, 2 / 12), (20, 2 / 20)]
    layer = record["layer"]
    assert (layer["tokens"], layer["measured_tokens"]) == (256, 256)
    assert layer["size"] == {"hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2}
    assert set(layer["whole"]) == {"oneshot", "residual", "joint", "split"}
    parts = layer["parts"]
    assert layer["whole"]["joint"] - layer["whole"]["residual"] == pytest.approx(parts["producers"] - parts["consumer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--channels", "12,0"], "--channels holds '0'"),
        (["--layer", "32x48"], "--layer is '32x48'; it must be HIDDENxINTERMEDIATExHEADSxKV_HEADS"),
        (["--layer", "32x48x3x1"], "the heads must divide half the hidden size"),
        (["--repeats", "0"], "--repeats, --tokens"),
        (["--measured-tokens", "0"], "--repeats, --tokens"),
    ],
)
def test_impossible_sizes_are_refused(capsys, arguments, message):
    assert main([*TINY, *arguments]) == 1
    assert message in capsys.readouterr().err
