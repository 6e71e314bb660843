import ast
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from numprune.export import manifest
from numprune.flows import stages
from numprune.flows.stages import Artifact, Stage, StageResult, run_stage

FLOWS = Path(stages.__file__).parent
ONE, TWO = "1" * 64, "2" * 64

# A stage in a process of its own: it appends to `calls` when its body runs, and waits for `go` inside the body.
PROGRAM = """
    import sys, time
    from pathlib import Path
    from numprune.flows.stages import Stage, run_stage

    workspace, calls, go = map(Path, sys.argv[1:])

    def body(out, *, a):
        (out / "half.bin").write_bytes(b"x" * 100_000)
        with calls.open("a") as file:
            file.write("called\\n")
        while not go.exists():
            time.sleep(0.01)
        return {"answer": 42}

    result = run_stage(workspace, Stage.of("slow", "serving", body, a=1))
    print(result.digest, result.reused)
"""


def test_peak_memory_of_a_stage_includes_its_child_processes() -> None:
    program = """
        import subprocess, sys
        from numprune.flows.stages import peak_memory_bytes

        before = peak_memory_bytes()
        subprocess.run([sys.executable, "-c", f"held = b'x' * {before + (64 << 20)}"], check=True)
        print(before, peak_memory_bytes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after >= before + (64 << 20)


@dataclass(frozen=True)
class Found:
    answer: int


def body(out: Path, *, source: Artifact, a: int = 1, other: Artifact | None = None) -> Found:
    (out / "data.bin").write_bytes(b"0123456789" * 1000)
    return Found(42)


def run(workspace: Path, name: str = "work", body: Callable[..., Found] = body, **changes: Any) -> StageResult[Found]:
    return run_stage(workspace, Stage.of(name, "serving", body, **{"source": Artifact(workspace, ONE), **changes}))


def start(tmp_path: Path) -> "subprocess.Popen[str]":
    arguments = [str(tmp_path / "workspace"), str(tmp_path / "calls"), str(tmp_path / "go")]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments], stdout=subprocess.PIPE, text=True
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_a_stage_is_computed_once(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert (first.reused, second.reused) == (False, True)
    assert (first.path, first.digest, first.facts) == (second.path, second.digest, Found(42))
    assert first.path.parent == tmp_path / "stages"
    assert first.path.name.startswith("work-")
    assert manifest.verify(first.path).parents == {"source": ONE}
    assert first.peak_memory_bytes > 1 << 20


@pytest.mark.parametrize(
    "changes", [{"source": Artifact(Path(), TWO)}, {"other": Artifact(Path(), ONE)}, {"a": 2}, {"name": "other"}]
)
def test_every_input_that_affects_the_content_changes_the_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert run(tmp_path).path != run(tmp_path, **changes).path


def test_the_location_of_an_artifact_does_not_affect_the_key(tmp_path: Path) -> None:
    assert run(tmp_path).path == run(tmp_path, source=Artifact(tmp_path / "elsewhere", ONE)).path


def test_arguments_without_an_identity_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="a: a PosixPath cannot be part of a stage's key; give an Artifact, a Text or plain"
    ):
        run(tmp_path, a=tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'b'"):
        run(tmp_path, b=1)


def test_another_code_version_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    monkeypatch.setattr(stages, "code_version", lambda layer: {"sources": "later"})
    assert run(tmp_path).path != first.path


def test_the_code_version_covers_the_layers_below_and_no_more() -> None:
    versions = [stages.code_version(layer) for layer in ("export", "serving", "studies")]
    assert len({version["sources"] for version in versions}) == 3
    assert "torch" in versions[0]
    names = {layer: {path.as_posix() for path in stages.sources(layer)} for layer in ("export", "serving")}
    assert {"pruning.py", "criteria/numerical.py", "flows/steps/prune.py", "export/manifest.py"} <= names["export"]
    assert "serving/benchmark/run.py" in names["serving"] - names["export"]
    assert not any(name.startswith(("flows/cli", "flows/studies")) for name in names["serving"])
    assert "flows/studies/compare/steps.py" in {path.as_posix() for path in stages.sources("studies")}


def modules_of_flows(path: Path) -> Iterator[Path]:
    """The files of `flows` that the module `path` imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numprune.flows"):
            folder = FLOWS.joinpath(*(node.module or "").split(".")[2:])
            yield from filter(
                Path.is_file, (folder.with_suffix(".py"), *(folder / f"{one.name}.py" for one in node.names))
            )


def test_the_code_version_covers_every_module_of_flows_that_a_body_uses() -> None:
    # stages.py makes the keys; the embedded text, and a recipe's paths, are in the digests of inputs.
    apart = {FLOWS / "stages.py", FLOWS / "recipe.py", FLOWS / "embedded" / "corpus.py"}
    used, unread = set[Path](), {*(FLOWS / "steps" / "bodies").glob("*.py")}
    while unread:
        used |= unread
        unread = {file for path in unread for file in modules_of_flows(path)} - used - apart
    assert {FLOWS / "steps" / "text.py", FLOWS / "sections.py"} <= used
    assert {f"flows/{file.relative_to(FLOWS)}" for file in used} <= {
        path.as_posix() for path in stages.sources("export")
    }


def test_a_body_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing(out: Path, *, source: Artifact) -> Found:
        body(out, source=source)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(tmp_path, body=failing)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [".locks"]
    assert not run(tmp_path).reused


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest"])
def test_a_damaged_stage_is_recomputed(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = run(tmp_path)
    data = first.path / "data.bin"
    match damage:
        case "flip":
            content = bytearray(data.read_bytes())
            content[5000] ^= 1
            data.write_bytes(content)
        case "truncate":
            data.write_bytes(data.read_bytes()[:-1])
        case "remove":
            data.unlink()
        case "add":
            (first.path / "more").touch()
        case "manifest":
            (first.path / "manifest.json").write_text("{}")
    again = run(tmp_path)
    assert not again.reused
    assert again.digest == first.digest
    assert "is damaged" in caplog.text
    assert run(tmp_path).reused


def test_a_folder_of_another_stage_is_not_reused(tmp_path: Path) -> None:
    first, other = run(tmp_path), run(tmp_path, a=2)
    for path in (first.path / name for name in ("data.bin", "manifest.json", "result.json")):
        path.write_bytes((other.path / path.name).read_bytes())
    assert not run(tmp_path).reused


def test_a_discarded_stage_is_recomputed(tmp_path: Path) -> None:
    stages.discard(run(tmp_path))
    assert not run(tmp_path).reused


def test_a_run_killed_inside_a_stage_is_resumed(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(tmp_path / "calls")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    folder = tmp_path / "workspace" / "stages"
    left = [path for path in folder.iterdir() if path.name != ".locks"]
    assert len(left) == 1
    assert left[0].name.endswith(".partial")

    (tmp_path / "go").touch()
    out, _ = start(tmp_path).communicate(timeout=60)
    assert out.split()[1] == "False"
    stages.sweep(tmp_path / "workspace")
    (made,) = [path for path in folder.iterdir() if path.name != ".locks"]
    assert manifest.verify(made).digest == out.split()[0]
    assert (tmp_path / "calls").read_text() == "called\n" * 2


def test_sweeping_leaves_active_stages_alone(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(tmp_path / "calls")
    stages.sweep(tmp_path / "workspace")
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.split()[1] == "False"


def test_concurrent_requests_do_the_work_once(tmp_path: Path) -> None:
    processes = [start(tmp_path), start(tmp_path)]
    wait_for(tmp_path / "calls")
    time.sleep(0.5)  # the other one comes to the lock
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert answers[0][0] == answers[1][0]
    assert sorted(answer[1] for answer in answers) == ["False", "True"]
    assert (tmp_path / "calls").read_text() == "called\n"
