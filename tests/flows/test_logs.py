import io
import json
import logging
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from numprune.errors import InputError
from numprune.flows import logs
from tests.flows.conftest import shell

logger = logging.getLogger("numprune.flows.something")


def test_json_lines_have_time_logger_message_and_context() -> None:
    stream = io.StringIO()
    with logs.to_stream("json", stream), logs.within(run="r1"), logs.within(stage="prune"):
        logger.warning("kept %d of %d\nunits é", 3, 4)
        try:
            raise ValueError("deep")
        except ValueError:
            logger.exception("went wrong")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first.pop("time"))).total_seconds()) < 60
    assert first == {
        "level": "WARNING",
        "logger": "numprune.flows.something",
        "message": "kept 3 of 4\nunits é",
        "run": "r1",
        "stage": "prune",
    }
    assert "ValueError: deep" in second["exception"]


def test_human_readable_lines_are_unchanged() -> None:
    stream = io.StringIO()
    with logs.to_stream("human", stream):
        logger.info("%-8s %6.1f s", "prune", 1.25)
    logger.info("after")
    assert stream.getvalue() == "prune       1.2 s\n"


def test_the_option_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logs.chosen(None) == "human"
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert (logs.chosen(None), logs.chosen("human")) == ("json", "human")
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(InputError, match=r"NUMPRUNE_LOG_FORMAT is 'xml'; it must be one of human, json"):
        logs.chosen(None)


def test_children_log_like_their_parent(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from numprune.flows import children, logs
        children._PRELOADED.clear()
        code = "from logging import getLogger as of; of('numprune.x').info('in the child'); of('lib').warning('w')"
        with logs.to_stream("json"), logs.within(run="r1"), logs.to_file(Path(sys.argv[1])), logs.within(stage="s1"):
            children.call(exec, code)
    """
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["message"], line["run"], line["stage"]) for line in found] == [
        ("in the child", "r1", "s1"),
        ("w", "r1", "s1"),
    ]
    (written,) = map(json.loads, path.read_text().splitlines())
    assert written == found[0]


def test_command_errors_are_log_lines() -> None:
    answered = shell("runs", "show", "--workspace", "/nowhere", "--log-format", "json")
    (line,) = map(json.loads, answered.err.splitlines())
    assert (answered.code, answered.out) == (1, "")
    assert (line["level"], line["message"]) == ("ERROR", "error: /nowhere: no run was recorded here")


def test_children_of_a_run_write_to_its_own_file_beside_other_runs(tmp_path: Path) -> None:
    """Several runs in threads of one process, as of a sweep."""
    with logs.within(run="r1"), logs.to_file(tmp_path / "1"):
        with logs.within(run="r2"), logs.to_file(tmp_path / "2"):
            assert logs.settings().files == (tmp_path / "2",)
            logger.info("second")
        assert logs.settings().files == (tmp_path / "1",)
        logger.info("first")
    for run, message in (("1", "first"), ("2", "second")):
        (line,) = (tmp_path / run).read_text().splitlines()
        assert (json.loads(line)["run"], json.loads(line)["message"]) == (f"r{run}", message)
