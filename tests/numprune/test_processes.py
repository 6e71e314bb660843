"""Processes that share the rows: the sums, the plan and the weights are those of a single process."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from numprune.byte_budget import LEVELS, ByteBudget
from numprune.divided import Divided
from numprune.errors import InputError, ProcessError
from numprune.layers import CopiedLayers, ModelLayers
from numprune.moments import Moments
from numprune.options import PruneOptions
from numprune.processes import ALONE, Processes, check_shareable, join
from numprune.pruning import narrowing_of, plan_layers, prune_layers, what_to_drop
from numprune.shape import Shape
from numprune.target import Target
from numprune.tasks import CAUSAL
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.masked import Masked
from tests.conftest import build_tiny
from tests.numprune.gloo import together

ROWS = torch.randint(0, 256, (21, 8), generator=torch.Generator().manual_seed(0))  # no number of processes divides it
OPTIONS = PruneOptions(0.3, target=Target(align=4), batch_size=4)  # uniform and joint
_slow = partial(pytest.param, marks=pytest.mark.slow)
MIXED, GROUPED = ByteBudget(80_000, 30_000, 2, LEVELS["mixed"]), Target(align=32, quantization_group=32)


@pytest.mark.parametrize(("rows", "batch", "count"), [(37, 4, 3), (128, 8, 8), (16, 8, 2), (8, 8, 3), (2, 8, 3)])
def test_shares_are_consecutive_batches_and_leave_nothing_out(rows: int, batch: int, count: int) -> None:
    shares = [Processes(index, count).share(rows, batch) for index in range(count)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    unit = batch if rows / batch >= count else 1
    assert max(sizes) - min(sizes) <= unit
    assert all(share.start % unit == 0 for share in shares)


def test_sums_are_those_of_all_processes() -> None:
    x, y = (torch.randn(30, size, generator=torch.Generator().manual_seed(size)) for size in (300, 5))
    whole = Moments(300, 5)
    for part in range(3):
        whole.add(x[part::3], y[part::3])

    def work(processes: Processes) -> Moments:
        own = Moments(300, 5)
        own.add(x[processes.index :: 3], y[processes.index :: 3])
        own.add_up(processes)
        return own

    for moments in together(3, work):
        assert moments.count == whole.count == 30
        for name in ("gram", "mean", "cross", "target_mean"):
            torch.testing.assert_close(getattr(moments, name), getattr(whole, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {"compensation": "oneshot"}),
        ("llama", {"compensation": "residual", "allocation": "error"}),
        ("llama", {}),
        ("llama", {"allocation": "error", "drop_layers": 1, "ratio": 0.6}),
        ("llama", {"allocation": "global", "compensation": "sequential", "batch_size": 32}),  # one batch
        _slow("llama", {"hidden_size": 24, "ratio": 0.4, "basis": "coordinates", "criterion": "taylor"}),
        _slow("llama", {"allocation": "error", "ratio": 0.0, "budget": MIXED, "target": GROUPED}),
        _slow("mixtral", {"allocation": "error"}),
    ],
)
def test_two_processes_prune_as_one(family, changed) -> None:
    options = replace(OPTIONS, **changed)
    models = [build_tiny(family, hidden_size=32, num_hidden_layers=2) for _ in range(2)]

    def work(processes: Processes):
        layers, cut = CopiedLayers(models[processes.index], processes=processes), {}
        dropped, narrowing = what_to_drop(layers, ROWS, options), narrowing_of(layers, ROWS, options)
        return prune_layers(layers, ROWS, options, cut.update, dropped=dropped, narrowing=narrowing), cut

    plan, weights = work(ALONE)
    for found in together(2, work):
        assert not isinstance(found, Exception), found
        assert found[0] == plan
        assert found[1].keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found[1][name], weight, atol=1e-6, rtol=0, msg=name)


def test_each_process_works_on_every_third_block() -> None:
    done: list[tuple[int, str]] = []

    def work(processes: Processes) -> dict[str, torch.Tensor]:
        divided = Divided(processes)
        for number in range(5):

            def result(number: int = number) -> torch.Tensor:
                done.append((processes.index, f"block {number}"))
                return torch.full((number + 1, 2) if number % 2 else (3,), number or torch.inf)

            divided.add(f"block {number}", result)
        return divided.results()

    for found in together(3, work):
        assert list(found) == [f"block {number}" for number in range(5)]
        assert [tuple(result.shape) for result in found.values()] == [(3,), (2, 2), (3,), (4, 2), (3,)]
        assert [float(result.flatten()[0]) for result in found.values()] == [torch.inf, 1, 2, 3, 4]
    assert sorted(done) == [(0, "block 0"), (0, "block 3"), (1, "block 1"), (1, "block 4"), (2, "block 2")]


def test_many_rows_for_a_step_along_a_line() -> None:
    """From 64 rows on, the length of the last step of `joint` comes from some of the rows only."""
    rows = torch.randint(0, 256, (97, 8), generator=torch.Generator().manual_seed(1))
    models = [build_tiny(hidden_size=32, num_hidden_layers=1) for _ in range(3)]

    def work(processes: Processes):
        cut: dict[str, torch.Tensor] = {}
        prune_layers(CopiedLayers(models[processes.index], processes=processes), rows, OPTIONS, cut.update)
        return cut

    weights = work(ALONE)
    for found in together(3, work):
        assert max(float((found[name] - weight).abs().max()) for name, weight in weights.items()) < 1e-6


def test_processes_plan_as_one() -> None:
    models, options = [build_tiny() for _ in range(2)], replace(OPTIONS, allocation="error")
    one, *plans = (
        plan_layers(ModelLayers(models[0]), ROWS, options),
        *together(2, lambda each: plan_layers(ModelLayers(models[each.index], processes=each), ROWS, options)),
    )
    assert plans == [one, one]


def test_a_process_that_fails_ends_the_others() -> None:
    def work(processes: Processes) -> None:
        if processes.index == 1:
            raise OSError("no space")
        processes.wait()

    survivor, failed = together(2, work)
    assert isinstance(failed, OSError)
    assert isinstance(survivor, ProcessError)
    assert "process 0 of 2: another process has ended" in str(survivor)


def test_processes_with_different_inputs_are_refused() -> None:
    for error in together(2, lambda each: each.require_same("texts", f"text {each.index}")):
        assert isinstance(error, InputError)
        assert "the texts differ between the 2 processes" in str(error)
    assert together(2, lambda each: each.require_same("texts", "text")) == [None, None]


@pytest.mark.parametrize(
    ("changed", "rows", "told"),
    [
        ({"refine": "search"}, 21, "the work for refine search; leave it out, or start numprune without torchrun"),
        ({"shapes": (Shape(64, 0),)}, 21, "the work for several shapes; give one hidden_size and one drop_layers, or"),
        ({"time_budget": object()}, 21, "the work for a budget of time; give a ratio or bytes, or start numprune"),
        ({}, 1, "1 calibration rows; start at most 1, or calibrate on more rows"),
    ],
)
def test_what_cannot_be_shared_is_refused(changed, rows, told) -> None:
    options = replace(OPTIONS, **changed)
    with pytest.raises(InputError, match=f"2 processes cannot share {told}"):
        check_shareable(options, rows, Processes(0, 2))
    check_shareable(options, rows, ALONE)


@pytest.mark.parametrize("task", [CAUSAL, Classification({"a": 0}), Masked(3), Embedding()])
def test_a_process_draws_what_a_single_one_draws_for_its_rows(task) -> None:
    rows = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(2))
    outputs = [torch.randn(1, 9, 7) if task.name in ("causal-lm", "masked-lm") else torch.randn(1, 7) for _ in rows]

    def losses(first: int) -> list[float]:
        draw = torch.Generator().manual_seed(0)
        task.skip(rows[:first], 7, draw)
        return [float(task.loss(outputs[row], rows[[row]], draw)) for row in range(first, 6)]

    assert losses(4) == losses(0)[4:]


def test_without_a_launcher_there_is_one_process(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of something else
    monkeypatch.delenv("RANK", raising=False)
    assert join(torch.device("cpu")) == ALONE
