"""Spans, sent to a real OTLP endpoint and decoded with OpenTelemetry's own protocol."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from numprune.errors import ParityError
from numprune.flows import logs, tracing
from numprune.flows.stages import run_stage
from tests.flows.collector import ENDPOINT, Collector, attributes
from tests.flows.conftest import work


def test_a_run_and_its_stages(collector: Collector, tmp_path: Path) -> None:
    with tracing.run("optimize", run="r1", name="model") as run, logs.within(run="r1"):
        with tracing.stage("prune") as stage:
            result = run_stage(tmp_path, work())
            stage.found(result)
        run.set(outcome="pass", version=None)
    spans = collector.spans()  # all of them, once the run is over
    assert set(spans) == {"optimize", "prune"}
    assert collector.services == {"numprune"}
    assert attributes(spans["optimize"]) == {"numprune.run": "r1", "numprune.name": "model", "numprune.outcome": "pass"}
    assert spans["prune"].parent_span_id == spans["optimize"].span_id
    assert spans["prune"].trace_id == spans["optimize"].trace_id
    assert attributes(spans["prune"]) == {
        "numprune.run": "r1",
        "numprune.stage": "prune",
        "numprune.folder": result.path.name,
        "numprune.digest": result.digest,
        "numprune.reused": False,
        "numprune.seconds": round(result.seconds, 3),
        "numprune.peak_memory_bytes": result.peak_memory_bytes,
        "numprune.bytes": result.bytes,
    }


def test_an_error_is_recorded_on_stage_and_run(collector: Collector) -> None:
    def fail() -> None:
        with tracing.run("optimize", run="r1"), tracing.stage("parity onnx"):
            raise ParityError("row 3, token 7")

    with pytest.raises(ParityError):
        fail()
    spans = collector.spans()
    assert set(spans) == {"optimize", "parity onnx"}
    for span in spans.values():
        assert span.status.code == Status.STATUS_CODE_ERROR
        (event,) = span.events
        told = {pair.key: pair.value.string_value for pair in event.attributes}
        assert told["exception.message"] == "row 3, token 7"
        assert told["exception.type"] == "numprune.errors.ParityError"


def watch_nothing() -> None:
    with tracing.run("optimize", run="r1") as run, tracing.stage("prune"):
        run.set(outcome="pass")


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    with tracing.run("optimize", run="r1") as run, tracing.stage("prune") as stage:
        assert run._span is stage._span is None


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({ENDPOINT: "http://127.0.0.1:9"}, "could not be delivered"),
        ({ENDPOINT: "not an address"}, "could not be delivered"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc'"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, None),
        ({"OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_an_unusable_endpoint_is_a_warning(
    collector: Collector,
    changes: dict[str, str],
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracing, "_CLOSING_S", 0.3)  # it would try for longer
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    watch_nothing()
    ours = [record.message for record in caplog.records if record.name.startswith("numprune")]
    assert warning is None or any(warning in message for message in ours)
    if "OTEL_EXPORTER_OTLP_TIMEOUT" not in changes:
        assert collector.spans() == {}


def test_an_endpoint_that_hangs_delays_a_run_only_briefly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "_CLOSING_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{silent.getsockname()[1]}")
        watch_nothing()
    assert "could not be delivered within 0.2 s and were dropped" in caplog.text  # the exporter tries for 10 s


def test_without_the_packages_a_warning_names_the_extra(tmp_path: Path) -> None:
    program = """
        import sys
        sys.modules["opentelemetry.exporter"] = None
        from numprune.flows import logs, tracing
        with logs.to_stream("human"), tracing.run("optimize", run="r1"):
            print("goes on")
    """
    environment = {**os.environ, ENDPOINT: "http://127.0.0.1:9"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "goes on\n"
    assert "pip install 'numprune[otel]'" in done.stderr
