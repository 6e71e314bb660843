"""numprune check-server without a server; test_vllm_server.py and others have real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.flows.cli import main
from numprune.flows.steps.reference_answers import answers_of
from numprune.serving.vllm.server import free_port


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "http://[", "no url"])
def test_an_unreachable_server_leaves_no_marker(
    url: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_of(tiny_checkpoint()).write(tmp_path)
    marker = tmp_path / "passed"
    marker.touch()
    assert main(["check-server", str(tmp_path), "--url", url.format(port=free_port()), "--marker", str(marker)]) == 1
    assert url.split("{")[0] in capsys.readouterr().err
    assert not marker.exists()


def test_a_release_without_a_reference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-server", str(tmp_path), "--url", "http://127.0.0.1:1"]) == 1
    assert "reference-answers.json: missing" in capsys.readouterr().err
