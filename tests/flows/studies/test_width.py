import json
from pathlib import Path

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.budget import budget_of
from numprune.export import checkpoint
from numprune.flows.studies import width
from numprune.flows.studies.rivals.minitron import embedding_importance, signal_moment
from numprune.hidden import narrowed
from tests.conftest import build_tiny

TEXT = Path(width.__file__).read_text(encoding="utf-8") * 2
ROWS = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(0))


def test_every_method_has_as_many_parameters(tiny_checkpoint, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    base = tiny_checkpoint(tie_word_embeddings=True, num_hidden_layers=3)
    options = ["--samples", "8", "--sequence-length", "32", "--windows", "24", "--sizes", "48", "--layers", "1,2"]
    asked = ["--calibration", str(text), "--heldout", str(text), "--out", str(tmp_path / "out")]
    assert width.main([str(base), *asked, *options]) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "width.json").read_text())
    by_method = {(row["size"], row["method"]): row for row in rows}
    anatomy = read_anatomy(checkpoint.read_config(base))
    equal = budget_of(narrowed(anatomy, 48, "fisher")).parameters
    names = ("Minitron's importance", "one basis of principal components", "coordinates", "fisher")
    assert {by_method["48", name]["parameters"] for name in names} == {equal}
    tied = budget_of(narrowed(anatomy, 48, "coordinates")).parameters
    assert by_method["48", "coordinates, output matrix shared"]["parameters"] == tied
    for rival in ("SliceGPT", "units (obs / uniform)"):
        assert by_method["48", rival]["parameters"] == pytest.approx(equal, rel=0.05)
    for layers in (1, 2):
        left = budget_of(anatomy.without(range(layers))).parameters
        of_depth = [row for (size, _), row in by_method.items() if size == f"{layers} fewer"]
        assert [row["parameters"] for row in of_depth] == [left] * 4
    assert all(row["interval95"][0] <= row["nll_delta"] <= row["interval95"][1] for row in rows)
    assert len(table.splitlines()) == len(rows) + 4
    assert (tmp_path / "out" / "width.md").read_text() == table


def test_the_rivals_scores_are_those_of_the_norms_outputs() -> None:
    model = build_tiny(num_hidden_layers=1)
    with torch.no_grad():
        layer, seen = model.model.layers[0], []
        paths = (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm)
        hooks = [norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for norm in paths]
        model(ROWS)
        for hook in hooks:
            hook.remove()
        norms = list(zip(paths, seen, strict=True))
        wanted = sum(norm(state).square().sum(1).sqrt().sum(0) for norm, state in norms) / len(ROWS)
        signals = [(norm(state) / norm.weight).flatten(0, 1).double() for norm, state in norms]
    torch.testing.assert_close(embedding_importance(model, ROWS, 2), wanted.double(), rtol=1e-4, atol=1e-4)
    moment = sum(signal.T @ signal for signal in signals)
    torch.testing.assert_close(signal_moment(model, ROWS, 2), moment, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "256"], "--sizes: 256 is not smaller than the model's hidden size 256"),
        (["--sizes", "192,192"], "--sizes: 192 is given twice"),
        (["--layers", "6"], "drop_layers is 6; the model has 6 layers, and at least one must stay"),
    ],
)
def test_impossible_sizes_are_refused(options: list[str], said: str, capsys) -> None:
    assert width.main(options) == 1
    assert said in capsys.readouterr().err
