"""A real vLLM server, intact and damaged, and its check."""

import copy
import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from numprune.errors import InputError, MissingRuntime, ParityError
from numprune.export import manifest
from numprune.flows.steps.answers import answer, answer_served, find_endpoint, read_rows
from numprune.flows.steps.harness import load_tasks
from numprune.serving import reference_answers
from numprune.serving.deployment import Deployment, prove
from numprune.serving.reference_answers import CompletionAnswers
from numprune.serving.vllm.environment import Environment
from numprune.serving.vllm.process import tagged
from numprune.serving.vllm.server import Server, ServerError, serving
from tests.flows.conftest import Answered, numprune  # noqa: F401 - a fixture
from tests.flows.tasks import NAME, write_task
from tests.serving.releases import SMALL, make_release, require_vllm, write_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def vllm() -> Environment:
    return require_vllm()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    folder = tmp_path_factory.mktemp("served")
    made = make_release(write_checkpoint(folder / "model"), folder / "release")
    return Deployment("tiny/1", "tiny", 1, manifest.read(made).digest, made, "float32")


KEY = "sesame-" + secrets.token_hex()


@pytest.fixture(scope="module")
def running(vllm: Environment, release: Deployment) -> Iterator[Server]:
    """With two names of the user's, and an API key."""
    can_reload = {"VLLM_SERVER_DEV_MODE": "1"}
    options = ["--served-model-name", "small", "tiny", *SMALL]
    with serving(
        vllm, release.checkpoint, name="other", dtype="float32", options=options, api_key=KEY, env=can_reload
    ) as started:
        yield started


@pytest.fixture
def reference(release: Deployment) -> CompletionAnswers:
    return reference_answers.read(release.folder)


def test_a_server_matches_transformers(running: Server, release: Deployment) -> None:
    found = prove(running, release, "float32")
    assert found["worst"]["error"] <= 1e-3
    assert found["greedy_match"] == 1.0
    assert found["greedy_compared"] == 4 * 32
    assert found["positions"] == found["greedy_compared"] + sum(
        len(prompt.tokens) - 1 + len(prompt.greedy) for prompt in reference_answers.read(release.folder).prompts
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_served_names_are_configurable(running: Server) -> None:
    models = httpx.get(f"{running.url}/v1/models", headers=running.headers, timeout=30).json()["data"]
    assert [model["id"] for model in models] == ["small", "tiny"]
    assert running.name == "small"


def test_the_api_key_is_required_and_never_revealed(running: Server, reference: CompletionAnswers) -> None:
    for key, message in (
        (None, "requires an API key: set .VLLM_API_KEY or give --api-key-file"),
        ("x", "rejects the API"),
    ):
        with pytest.raises(ServerError, match=message):
            reference_answers.check(running.url, reference, "float32", key)
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    assert not any(KEY in word for process in family for word in process.cmdline())
    assert KEY not in running.process.log.read_text()
    assert KEY not in repr(running)


Json = dict[str, Any]


def a_logprob(data: Json) -> str:
    data["prompts"][1]["logprobs"][6] -= 0.002
    return r"prefill, prompt 1, position 7, .*differs by 0\.002"


def a_greedy_logprob(data: Json) -> str:
    data["prompts"][2]["greedy_logprobs"][3] -= 0.01
    return rf"prompt 2, position {len(data['prompts'][2]['tokens']) + 3}, .*differs by 0\.01 "


def a_greedy_token(data: Json) -> str:
    prompt = data["prompts"][0]
    prompt["greedy"][31] = (prompt["greedy"][31] + 1) % 256  # the last: nothing that follows gives it away
    prompt["margins"][31] = 1.0
    return rf"position {len(prompt['tokens']) + 31}, "


def the_tokenizer(data: Json) -> str:
    data["texts"][3]["tokens"][2] += 1
    return r"tokenizer reads 'Zażółć.* it belongs to another model"


@pytest.mark.parametrize("spoil", [a_logprob, a_greedy_logprob, a_greedy_token, the_tokenizer])
def test_every_difference_from_the_reference_is_named(
    running: Server, reference: CompletionAnswers, spoil: Callable[[Json], str]
) -> None:
    data = copy.deepcopy(reference.model_dump(by_alias=True))
    message = spoil(data)
    with pytest.raises(ParityError, match=message):
        reference_answers.check(running.url, CompletionAnswers.model_validate(data), "float32", KEY)


def test_another_release_s_reference_clearly_fails_even_in_half_precision(running: Server, tmp_path: Path) -> None:
    other = make_release(write_checkpoint(tmp_path / "model", seed=1), tmp_path / "release")
    for dtype in reference_answers.TOLERANCES:
        with pytest.raises(ParityError):
            reference_answers.check(running.url, reference_answers.read(other), dtype, KEY)


def test_near_ties_are_tolerated(running: Server, reference: CompletionAnswers) -> None:
    data = copy.deepcopy(reference.model_dump(by_alias=True))
    prompt = data["prompts"][3]
    start = len(prompt["tokens"])
    prompt["greedy"][30] = (prompt["greedy"][30] + 1) % 256
    data["rounding"]["float32"] = {"worst": 1.0, "mean": 0.1}  # so that another token counts as a near tie
    prompt["margins"][30] = 0.5
    # What follows the other token is taken from the server itself.
    body = {"model": "tiny", "prompt": [*prompt["tokens"], *prompt["greedy"][:31]], "max_tokens": 1, "temperature": 0}
    body |= {"prompt_logprobs": 0, "logprobs": 0, "return_token_ids": True}
    answer = httpx.post(f"{running.url}/v1/completions", json=body, headers=running.headers, timeout=60)
    [given] = answer.json()["choices"]
    prompt["greedy_logprobs"][30] = given["prompt_logprobs"][start + 30][str(prompt["greedy"][30])]["logprob"]
    [prompt["greedy"][31]], [prompt["greedy_logprobs"][31]] = given["token_ids"], given["logprobs"]["token_logprobs"]
    found = reference_answers.check(running.url, CompletionAnswers.model_validate(data), "float32", KEY)
    assert found["greedy_compared"] == 4 * 32
    assert found["greedy_match"] == 127 / 128
    assert found["worst"]["position"] == start + 30


def test_server_refusals_are_reported(running: Server, reference: CompletionAnswers) -> None:
    data = reference.model_dump(by_alias=True)
    data["prompts"][0]["tokens"] *= 3  # beyond --max-model-len
    data["prompts"][0]["logprobs"] = [-1.0] * (len(data["prompts"][0]["tokens"]) - 1)
    with pytest.raises(ServerError, match=r"/v1/completions returned 400: .*context length"):
        reference_answers.check(running.url, CompletionAnswers.model_validate(data), "float32", KEY)


def test_tasks_are_answered_as_in_torch(
    running: Server,
    release: Deployment,
    numprune: Callable[..., Answered],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = release.checkpoint
    tasks = load_tasks([str(write_task(tmp_path / "task", base, 12))])
    for runtime in ("torch", "vllm"):
        (tmp_path / runtime).mkdir()
    answer(tmp_path / "torch", tasks, base, "torch", torch.device("cpu"))
    with pytest.raises(InputError, match="it requires an API key"):
        find_endpoint(running.url, None)
    found = answer_served(tmp_path / "vllm", tasks, base, find_endpoint(running.url, KEY))
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    asked = ("--tasks", tmp_path / "task" / "task.yaml", "--limit", 4, "--url", running.url)
    compared = numprune("tasks", base, "--baseline", base, *asked, "--json").json
    assert (found.runtime, found.tasks[NAME].accuracy) == ("vllm", {"acc": 1.0})
    assert compared["runtimes"] == {"candidate": "vllm", "baseline": "torch"}
    assert compared["tasks"][NAME]["acc"]["candidate"] == 1.0
    served, ours = (read_rows(tmp_path / runtime, NAME) for runtime in ("vllm", "torch"))
    for one, other in zip(served, ours, strict=True):
        logprobs = [[answer[0] for answer in row["answers"]] for row in (one, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)


def test_mismatched_weights_are_not_reloaded(running: Server, release: Deployment, tmp_path: Path) -> None:
    """By itself vLLM cuts them to size and goes on with another model."""
    wider = write_checkpoint(tmp_path / "wider", intermediate_size=128)
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(wider)}}
    assert httpx.post(f"{running.url}/collective_rpc", json=body, timeout=120).status_code == 500
    assert re.search(
        r"mlp\.\w+\.weight: stored with shape .*128.* config\.json implies", running.process.log.read_text()
    )
    assert prove(running, release, "float32")["greedy_match"] == 1.0


def test_a_port_in_use_is_refused_before_anything_starts(
    vllm: Environment, running: Server, release: Deployment
) -> None:
    port = int(running.url.rpartition(":")[2])
    before = {tag for _, tag in tagged("server-")}
    with (
        pytest.raises(InputError, match=rf"--port {port}: cannot be used .*Address already in use"),
        serving(vllm, release.checkpoint, name="tiny", port=port),
    ):
        pass
    assert {tag for _, tag in tagged("server-")} == before


def test_layers_that_differ_need_the_plugin(vllm: Environment, release: Deployment, tmp_path: Path) -> None:
    bare = Environment(vllm.python, vllm.version, vllm.cpu, None, None)
    (tmp_path / "config.json").write_text('{"model_type": "numprune_llama"}')
    with (
        pytest.raises(MissingRuntime, match=r"differ in size \(numprune_llama\).*numprune-vllm.*make env-vllm"),
        serving(bare, tmp_path, name="tiny"),
    ):
        pass


def test_a_server_killed_during_its_check_is_a_named_error(running: Server, release: Deployment) -> None:
    """The last test here: it takes the server away."""
    log = running.process.log
    before = log.read_bytes().count(b"POST /tokenize")
    for process, _ in tagged(running.process.tag):
        if process.pid != running.pid:
            process.suspend()  # the engine: from here on no completion is answered, so the check cannot have ended
    asked = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not asked.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
            if log.read_bytes().count(b"POST /tokenize") > before:
                asked.set()
        os.kill(running.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ServerError, match="small: vLLM was ended by SIGKILL"):
        prove(running, release, "float32")
    killer.join()
    assert asked.is_set()
    running.stop()
    assert [tag for _, tag in tagged(running.process.tag)] == []
