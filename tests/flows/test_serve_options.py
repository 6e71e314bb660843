"""What `serve` and `rollout` refuse before any download or start; vLLM is not needed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from numprune.flows.cli import main
from numprune.serving.vllm.environment import TESTED
from tests.flows.conftest import Answered
from tests.serving.test_vllm_environment import make as make_environment


@pytest.mark.parametrize("command", ["serve", "rollout", "rollback"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--api-key=hunter2",
            "-- --api-key: other users could see it; set $VLLM_API_KEY or give --api-key-file before",
        ),
        ("--api_key", "-- --api_key: other users could see it"),
        ("--port=1", "-- --port: give --port before the --"),
        ("--host", "-- --host: give --host before the --"),
        ("--model=x", "-- --model: the release determines the model"),
        ("--uds=/x", "-- --uds: the server must listen on --host and --port"),
    ],
)
def test_options_that_numprune_sets_itself_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, option: str, said: str
) -> None:
    vllm = make_environment(tmp_path / "e", vllm=TESTED[-1], vllm_router="0.1.17")
    assert main([command, "my-model", "--workspace", str(tmp_path), "--vllm", str(vllm), "--", option, "hunter2"]) == 1
    written = capsys.readouterr().err
    assert said in written
    assert "hunter2" not in written


@pytest.mark.parametrize("command", ["serve", "rollout", "check-server"])
def test_an_invalid_key_is_refused_and_not_repeated(
    numprune: Callable[..., Answered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hunter2 hunter2")
    vllm = make_environment(tmp_path / "e", vllm=TESTED[-1], vllm_router="0.1.17")
    more = ("--url", "http://127.0.0.1:1") if command == "check-server" else ("--workspace", tmp_path, "--vllm", vllm)
    refused = numprune(command, "my-model", *more)
    assert refused.code == 1
    assert "$VLLM_API_KEY: not an API key" in refused.err
    assert "hunter2" not in refused.err
    file = tmp_path / "none"
    assert f"--api-key-file {file}: cannot be read" in numprune(command, "my-model", *more, "--api-key-file", file).err


def test_serve_help_shows_precisions_and_api_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "compute precision: auto, float32, bfloat16, float16 (default: auto, the weights' precision)" in text
    assert "(default: $VLLM_API_KEY, if set)" in text
