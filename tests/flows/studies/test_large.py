"""All other commands accept the random checkpoint."""

from pathlib import Path

import pytest

from numprune.export import checkpoint
from numprune.flows.studies import large


def test_a_random_checkpoint_has_the_requested_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "large"
    assert large.main([str(out), "--gigabytes", "0.01", "--hidden-size", "256", "--vocabulary", "5000"]) == 0
    size = checkpoint.weight_bytes(out)
    layer = 2 * (2 * 256**2 + 2 * 256 * 64 + 3 * 256 * 512 + 2 * 256)
    assert 10**7 <= size < 10**7 + layer
    assert f"{size:,} bytes" in capsys.readouterr().out
    model, tokenizer = checkpoint.load(out)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    assert not weight.equal(model.model.layers[1].mlp.up_proj.weight)
    assert model.model.norm.weight.eq(1).all()
    assert tokenizer.encode("def f(x):")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--hidden-size", "300"], "--hidden-size 300: it must be a multiple of 256"),
        (["--vocabulary", "100"], "the tokenizer has 4096 tokens, but config.json says vocab_size=100"),
    ],
)
def test_invalid_model_sizes_are_refused(
    tmp_path: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert large.main([str(tmp_path / "out"), *argv]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
