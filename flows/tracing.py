"""OpenTelemetry spans of runs and stages, sent if OTEL_EXPORTER_OTLP_ENDPOINT (or …_TRACES_ENDPOINT) is set.

Tracing must not affect a run. Those variables are often set for a whole cluster, so if packages are missing, the
protocol is unsupported or nothing listens, a warning is logged and the run continues. The tracer provider is private:
Prefect's and MLflow's spans are configured separately.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from numprune.flows import logs
from numprune.serving import loopback

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

    from numprune.flows.stages import StageResult

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CLOSING_S = 3.0  # limit on waiting for the last spans at the end of a run
_PREFIX = "numprune."  # prefix of our attributes

_tracer: ContextVar["Tracer | None"] = ContextVar("numprune_tracer", default=None)


class Watched:
    """A span, or a no-op if spans are not sent."""

    def __init__(self, span: "Span | None") -> None:
        self._span = span

    def set(self, **attributes: str | bool | int | float | None) -> None:
        """Add attributes, ignoring None."""
        if self._span is not None:
            self._span.set_attributes(
                {_PREFIX + name: value for name, value in attributes.items() if value is not None}
            )

    def found(self, result: "StageResult[Any]") -> None:
        """Record the result of a stage."""
        self.set(
            folder=result.path.name,
            digest=result.digest,
            reused=result.reused,
            seconds=round(result.seconds, 3),
            peak_memory_bytes=result.peak_memory_bytes,
            bytes=result.bytes,
            outcome=getattr(result.facts, "outcome", None),  # of a report
        )


@contextmanager
def run(name: str, /, **attributes: str) -> Iterator[Watched]:
    """A span for a run, the root of its stages' spans; at its end all spans are sent, or dropped after a timeout."""
    made = _provider()
    if made is None:
        yield Watched(None)
        return
    provider, delivery = made
    token = _tracer.set(provider.get_tracer("numprune"))
    try:
        with _span(name, attributes) as watched:
            yield watched
    finally:
        _tracer.reset(token)
        _close(provider, delivery)


@contextmanager
def stage(name: str) -> Iterator[Watched]:
    """A span for a stage within the current run's context."""
    with _span(name, {"stage": name, "run": logs.place().run or ""}) as watched:
        yield watched


@contextmanager
def _span(name: str, attributes: Mapping[str, str]) -> Iterator[Watched]:
    tracer = _tracer.get()
    if tracer is None:
        yield Watched(None)
        return
    with tracer.start_as_current_span(name) as span:  # an exception is recorded and sets the span's status to error
        watched = Watched(span)
        watched.set(**attributes)
        yield watched


def _provider() -> "tuple[TracerProvider, _Delivery] | None":
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), None)
    if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "http/protobuf")
    if protocol != "http/protobuf":
        logger.warning(
            "no spans are sent: OTEL_EXPORTER_OTLP_PROTOCOL is %r, but only http/protobuf is supported", protocol
        )
        return None
    try:
        return _make_provider(endpoint)
    except ImportError as error:
        logger.warning("no spans are sent, though an endpoint is set: %s; pip install 'numprune[otel]'", error)
    except Exception as error:  # whatever the SDK raises for a malformed variable
        logger.warning("no spans are sent: OpenTelemetry cannot be set up: %s", error)
    return None


def _make_provider(endpoint: str) -> "tuple[TracerProvider, _Delivery]":
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)  # it logs every attempt; we log once
    named = os.environ.get("OTEL_SERVICE_NAME")
    provider = TracerProvider(
        resource=Resource.create({} if named else {"service.name": "numprune"}), shutdown_on_exit=False
    )
    session = requests.Session()
    session.proxies.update(loopback.proxies(endpoint))
    delivery = _Delivery(OTLPSpanExporter(session=session))
    provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", delivery)))
    return provider, delivery


class _Delivery:
    """The exporter, and the number of undelivered spans."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self.lost = 0

    def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
        result = self._exporter.export(spans)
        self.lost += 0 if result.name == "SUCCESS" else len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _close(provider: "TracerProvider", delivery: _Delivery) -> None:
    """Send the remaining spans. Shutting down waits for the exporter's retries, so it runs in the background."""
    closing = threading.Thread(target=provider.shutdown, name="numprune-spans", daemon=True)
    closing.start()
    closing.join(_CLOSING_S)
    if closing.is_alive():
        logger.warning("the last spans could not be delivered within %g s and were dropped", _CLOSING_S)
    elif delivery.lost:
        logger.warning("%d spans could not be delivered", delivery.lost)
