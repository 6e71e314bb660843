"""A study refuses an --out that it cannot write to, before any work."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from numprune.flows.studies import precision, served
from numprune.flows.studies.compare import command as compare
from numprune.flows.studies.genai import command as genai
from numprune.flows.studies.gpu import command as gpu
from numprune.flows.studies.learned import command as learned
from numprune.flows.studies.search import command as search


@pytest.mark.parametrize(
    "main", [learned.main, precision.main, served.main, genai.main, gpu.main, search.main, compare.main]
)
def test_a_place_that_cannot_be_written_in_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int]
) -> None:
    (tmp_path / "file").touch()
    words = ["--out", str(tmp_path / "file" / "out")]
    if main is compare.main:
        assert main(words) == 1
    else:
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert f"{tmp_path / 'file'}: not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").is_file()
