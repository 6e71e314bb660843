"""`numprune serve`, `rollout`, `rollback` and the release flow with real vLLM servers.

What is served is the embedded model, pruned: version 1 with a uniform shape on stock vLLM, version 2 with a shape per
layer through the plug-in.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from numprune.flows import embedded
from numprune.flows.release import release
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.serving import deployment, reference_answers, registry, rollout
from numprune.serving.rollout.state import Place
from numprune.serving.vllm import api_key
from numprune.serving.vllm.process import TAG, kill_tagged, tagged
from numprune.serving.vllm.server import free_port
from tests.flows.conftest import Answered
from tests.serving.releases import SMALL, make_release, publish, require_vllm
from tests.serving.test_vllm_environment import make as make_environment
from tests.serving.workspaces import stored

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NAME = "embedded"
BASE = Path(embedded.__file__).parent / "model"
WEIGHTS = "model.safetensors"
SERVED = ("--dtype", "float32")  # in which a server must agree with transformers to 1e-3
KEY = secrets.token_hex()
HEADERS = {"Authorization": f"Bearer {KEY}"}
WAIT_S = 240
BEGUN: list["subprocess.Popen[str]"] = []


def pruned(out: Path, allocation: str, seed: int = 0) -> Path:
    """The embedded model, pruned with random rows."""
    rows = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(seed))
    options = PruneOptions(ratio=0.3, allocation=allocation, compensation="oneshot")
    prune_checkpoint(BASE, rows, options, out, torch.device("cpu"))
    return out


@pytest.fixture(autouse=True)
def _api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers here have an API key, from the environment."""
    monkeypatch.setenv(api_key.VARIABLE, KEY)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two versions: the first in production, the second a candidate."""
    require_vllm()
    folder = tmp_path_factory.mktemp("deploy")
    for allocation in ("uniform", "global"):
        made = make_release(pruned(folder / allocation, allocation), folder / f"release {allocation}")
        publish(made, folder / "w", NAME, promote=allocation == "uniform")
    kinds = [json.loads((folder / kind / "config.json").read_text())["model_type"] for kind in ("uniform", "global")]
    assert [kind.startswith("numprune_") for kind in kinds] == [False, True]
    yield folder / "w"
    for process in BEGUN:
        process.kill()  # those of a test that failed; the others have ended
        process.wait()
    rollout.stop(NAME, folder / "w")
    for _, tag in list(tagged(Place(folder / "w", NAME).tag_prefix)):
        kill_tagged(tag)


def begin(workspace: Path, command: str, *arguments: object, options: Sequence[str] = SMALL) -> "subprocess.Popen[str]":
    """A command that starts servers, in a process of its own."""
    words = [command, *map(str, arguments), "--workspace", str(workspace), "--json", "--", *options]
    BEGUN.append(
        subprocess.Popen(
            [sys.executable, "-m", "numprune.flows.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return BEGUN[-1]


def end(process: "subprocess.Popen[str]") -> Answered:
    out, err = process.communicate(timeout=WAIT_S)
    return Answered(process.returncode, out, err)


def run(workspace: Path, command: str, *arguments: object, options: Sequence[str] = SMALL) -> Answered:
    return end(begin(workspace, command, *arguments, options=options))


def wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return found


def below(pid: int) -> list[psutil.Process]:
    """The server that a command started, with its children: those whose environment has a tag."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            found += [child] if TAG in child.environ() else []
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in processes)


# --- serve -----------------------------------------------------------------------------------------


def test_serve_until_sigterm(workspace: Path) -> None:
    port = free_port()
    # The memory is numprune's choice, which vLLM must accept on this machine.
    options = [*SMALL[: SMALL.index("--kv-cache-memory-bytes")], "--served-model-name", "first", "second"]
    serving = begin(workspace, "serve", f"{NAME}@candidate", "--port", port, *SERVED, options=options)
    assert serving.stdout is not None
    assert serving.stderr is not None
    text = ""
    while "}\n" not in text or text.count("{") != text.count("}"):
        line = serving.stdout.readline()
        assert line, serving.stderr.read()
        text += line
    ready = json.loads(text)
    assert (ready["reference"], ready["url"], ready["dtype"]) == ("embedded/2", f"http://127.0.0.1:{port}", "float32")
    assert ready["server_check"]["worst"]["error"] <= 1e-3
    assert ready["server_check"]["greedy_match"] == 1.0
    assert ready["name"] == "first"
    body = {"model": "second", "prompt": "Hello", "max_tokens": 3}
    asked = partial(httpx.post, f"{ready['url']}/v1/completions", json=body, timeout=60)
    assert (asked(headers=HEADERS).status_code, asked().status_code) == (200, 401)

    refused = run(workspace, "serve", NAME, "--port", port)
    assert refused.code == 1
    assert f"--port {port}: cannot be used on 127.0.0.1 (Address already in use)" in refused.err

    servers = below(serving.pid)
    assert len(servers) >= 2  # the API and the engine at least
    serving.send_signal(signal.SIGTERM)
    stopped = end(serving)
    assert (stopped.code, stopped.out) == (0, "")
    assert "server check passed in float32" in stopped.err
    assert re.search(r"vLLM gets [\d.]+ % of the memory, .*, leaving half of the free memory", stopped.err)
    assert KEY not in stopped.err + text
    assert "Traceback" not in stopped.err
    assert gone(servers)


def test_stopping_serve_while_vllm_starts_leaves_nothing_behind(workspace: Path) -> None:
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    started = {sent: begin(workspace, "serve", NAME, "--port", free_port()) for sent in codes}
    servers = {
        sent: wait(lambda: len(found := below(serving.pid)) >= 2 and found, "the engine's process is there")  # noqa: B023
        for sent, serving in started.items()
    }
    for sent, serving in started.items():
        serving.send_signal(sent)
    assert {sent: end(serving).code for sent, serving in started.items()} == codes
    for found in servers.values():
        wait(lambda: gone(found), "vLLM has ended")  # noqa: B023


def test_a_missing_or_untested_vllm_is_refused_with_the_install_command(
    numprune: Callable[..., Answered], workspace: Path, tmp_path: Path
) -> None:
    untested = make_environment(tmp_path / "e", vllm="0.31.0", vllm_router="0.1.17")
    for command in ("serve", "rollout"):
        for where, said in ((tmp_path / "none", "no virtual environment there"), (untested, "has vLLM 0.31.0")):
            refused = numprune(command, NAME, "--workspace", workspace, "--vllm", where)
            assert (refused.code, refused.out) == (1, "")
            assert refused.err.startswith("numprune: error: ")
            assert refused.err.count("\n") == 1
            assert said in refused.err
            assert "make env-vllm" in refused.err


# --- rollout and rollback --------------------------------------------------------------------------


@dataclass
class Traffic:
    """Requests to the public address, one after the other in each of two threads, until the block is left."""

    url: str
    expected: dict[tuple[int, ...], str]  # greedy tokens -> which version gives them
    prompt: list[int]
    failures: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)  # by which version, in order
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Traffic":
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        length = len(next(iter(self.expected)))
        body = {
            "model": NAME,
            "prompt": self.prompt,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=HEADERS, timeout=120)
                tokens = tuple(answer.json()["choices"][0]["token_ids"])
                self.answered.append(self.expected[tokens])
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            time.sleep(0.5)  # two cores: what is started needs them too


def traffic(workspace: Path, url: str) -> Traffic:
    """Each answer must be, token by token, that of one of the two versions."""
    folders = [workspace.parent / f"release {kind}" for kind in ("uniform", "global")]
    references = [reference_answers.read(folder) for folder in folders]
    steps = 6
    margins = [
        min(margin for reference in references for margin in reference.prompts[number].margins[:steps])
        for number in range(len(references[0].prompts))
    ]
    number = margins.index(max(margins))
    assert margins[number] > 1e-3
    expected = {
        tuple(reference.prompts[number].greedy[:steps]): f"{NAME}/{version}"
        for version, reference in enumerate(references, start=1)
    }
    assert len(expected) == 2
    return Traffic(url, expected, references[0].prompts[number].tokens)


def production(workspace: Path) -> int:
    return registry.verify(registry.open_registry(None, workspace), NAME).version


def test_a_rollout_under_load_succeeds_after_a_killed_one(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(workspace, NAME)
    port = free_port()
    first = run(workspace, "rollout", NAME, "--port", port, *SERVED)
    assert first.code == 0, first.err
    assert first.json["server_check"]["worst"]["error"] <= 1e-3
    assert first.json["server_check"]["greedy_match"] == 1.0
    assert first.json["url"] == f"http://127.0.0.1:{port}"
    assert (first.json["reference"], first.json["changed"], first.json["previous"]) == ("embedded/1", True, None)
    blue = psutil.Process(first.json["pid"])
    for key, code in (("", 2), (KEY, 0)):  # a key is not dropped by whoever forgets it
        monkeypatch.setenv(api_key.VARIABLE, key)
        again = run(workspace, "rollout", NAME)
        assert (again.code, "is served with an API key" in again.err) == (code, code == 2)
    assert KEY not in place.folder.joinpath("state.json").read_text()

    with traffic(workspace, first.json["url"]) as load:
        # Two at once: one refuses. Then the other is killed in the middle: blue serves on, green is left half started.
        second = begin(workspace, "rollout", f"{NAME}@candidate")
        known = place.read().tags()
        green = wait(lambda: {tag for _, tag in tagged(place.tag_prefix)} - known, "green is starting")
        for process, tag in tagged(place.tag_prefix):
            if tag in green:
                process.suspend()  # it shall not be there before the rollout is killed
        refused = run(workspace, "rollout", f"{NAME}@candidate")
        assert refused.code == 1
        assert f"another rollout is in progress (process {second.pid})" in refused.err
        second.send_signal(signal.SIGKILL)
        end(second)
        assert not gone([blue])
        assert {tag for _, tag in tagged(place.tag_prefix)} == known | green

        # The release flow puts that in order, promotes, and rolls out with the address, precision and options of blue.
        assert production(workspace) == 1
        state = release(NAME, str(workspace), approval=False, return_state=True)
        assert state.is_completed(), state.message
        found = state.result()
        assert (found["release"], found["previous"], production(workspace)) == ("embedded/2", "embedded/1", 2)
        again = found["served"]
        assert (again["reference"], again["previous"]) == ("embedded/2", "embedded/1")
        assert again["server_check"]["dtype"] == "float32"
        assert again["server_check"]["worst"]["error"] <= 1e-3
        assert again["server_check"]["greedy_match"] == 1.0
        assert again["cut_off"] == 0
        assert again["url"] == first.json["url"]
        assert {tag for _, tag in tagged(place.tag_prefix)} == place.read().tags()
        assert green & place.read().tags() == set()
        assert gone([blue])
        done = len(load.answered)
        wait(lambda: len(load.answered) >= done + 4, "requests go on")
        assert set(load.answered[done + 2 :]) == {"embedded/2"}
    assert load.failures == []
    assert (load.answered[0], load.answered[-1]) == ("embedded/1", "embedded/2")


# What is done to the files of version 1 in the registry, and what is said. `other` is a release of the same sizes.


def truncate(release: Path, other: Path) -> str:
    weights = release / "checkpoint" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return WEIGHTS


def weights_of_another_release(release: Path, other: Path) -> str:
    shutil.copyfile(other / "checkpoint" / WEIGHTS, release / "checkpoint" / WEIGHTS)
    return WEIGHTS


def edit_config(release: Path, other: Path) -> str:
    config = release / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0'))
    return r"config\.json"


def dense_weights(release: Path, other: Path) -> str:
    shutil.copyfile(BASE / WEIGHTS, release / "checkpoint" / WEIGHTS)
    return WEIGHTS


def another_tokenizer(release: Path, other: Path) -> str:
    swap_tokens(release / "checkpoint")
    return r"tokenizer\.json"


def swap_tokens(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    path.write_text(json.dumps(tokenizer))


def test_a_failed_rollout_changes_nothing_and_a_rollback_works_under_load(workspace: Path, tmp_path: Path) -> None:
    place = Place(workspace, NAME)
    opened = registry.open_registry(None, workspace)
    registry.promote(opened, f"{NAME}/2")  # which the test before this one has done already, as
    begun = run(workspace, "rollout", NAME, *SERVED)  # this
    assert begun.code == 0, begun.err
    served = begun.json
    first = registry.verify(opened, f"{NAME}/1")
    copy = workspace / "served" / f"{NAME}-{first.digest[:16]}"
    settings = rollout.Settings(require_vllm(), api_key=KEY)

    def fails(version: int, message: str) -> None:
        prepare = partial(deployment.prepare, opened, f"{NAME}/{version}", workspace)
        with pytest.raises(rollout.RolloutFailed, match=f"(?s){message}.*; embedded/2 keeps serving"):
            rollout.roll_out(NAME, prepare, workspace, settings)
        assert rollout.status(NAME, workspace)["current"]["pid"] == served["pid"]
        assert {tag for _, tag in tagged(place.tag_prefix)} == place.read().tags()

    with traffic(workspace, served["url"]) as load:
        # What is not what was published is not started.
        other = make_release(pruned(tmp_path / "other", "uniform", seed=1), tmp_path / "release")
        for damage in (truncate, weights_of_another_release, edit_config, dense_weights, another_tokenizer):
            files = stored(workspace, first)
            shutil.copytree(files, tmp_path / damage.__name__)
            shutil.rmtree(copy, ignore_errors=True)  # which is whole, and would do
            message = damage(files, other)
            fails(1, message)
            shutil.rmtree(files)
            shutil.copytree(tmp_path / damage.__name__, files)

        # Nor is what was published with every digest right, and is not what its configuration says: vLLM would cut it.
        uniform = workspace.parent / "uniform"
        dense = make_release(
            uniform, tmp_path / "dense", lambda folder: shutil.copyfile(BASE / WEIGHTS, folder / WEIGHTS)
        )
        fails(
            publish(dense, workspace, NAME, promote=False).version, r"\S+\.weight has shape .* but config\.json implies"
        )

        # What only the running server can tell: its tokenizer is another one.
        babel = make_release(uniform, tmp_path / "babel", swap_tokens)
        fails(publish(babel, workspace, NAME, promote=False).version, "the server's tokenizer reads .* another model")

        # A server for which there is not enough memory.
        failed = run(workspace, "rollout", f"{NAME}/1", options=[*SMALL[:3], "--kv-cache-memory-bytes", str(1 << 50)])
        assert failed.code == 2
        assert failed.json["exit_code"] == 2
        assert re.search(r"embedded: vLLM ended with exit status 1; its last lines: .*Error", failed.err)
        assert "embedded/2 keeps serving" in failed.err
        assert rollout.status(NAME, workspace)["current"]["pid"] == served["pid"]
        assert {tag for _, tag in tagged(place.tag_prefix)} == place.read().tags()

        # Back to the version before: the alias moves once it serves. Copies that nobody needs any more go.
        unneeded = workspace / "served" / f"{NAME}-{'0' * 16}"
        unneeded.mkdir()
        os.utime(unneeded, (0, 0))
        assert production(workspace) == 2
        back = run(workspace, "rollback", NAME)
        assert back.code == 0, back.err
        assert (back.json["reference"], back.json["previous"]) == ("embedded/1", "embedded/2")
        assert production(workspace) == 1
        assert not unneeded.exists()
        assert copy.is_dir()
        done = len(load.answered)
        wait(lambda: len(load.answered) >= done + 4, "requests go on")
    assert load.failures == []
    assert (load.answered[0], load.answered[-1]) == ("embedded/2", "embedded/1")

    # Servers and router outlive the command; --stop ends them.
    status = run(workspace, "rollout", NAME, "--status")
    assert (status.code, status.json["serving"]) == (0, True)
    nothing_before = run(workspace, "rollback", NAME)
    assert nothing_before.code == 2
    assert "no version was in production before embedded/1" in nothing_before.err
    assert run(workspace, "rollout", NAME, "--stop").json["stopped"] == ["embedded/1"]
    assert [tag for _, tag in tagged(place.tag_prefix)] == []
    assert run(workspace, "rollout", NAME, "--status").code == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served['url']}/health")
    assert os.path.exists(status.json["current"]["log"])
