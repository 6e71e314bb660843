"""An OTLP/HTTP endpoint that decodes and keeps what it receives, with OpenTelemetry's own protocol."""

import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector:
    """`spans`: those received since the last call, by name."""

    def __init__(self) -> None:
        received: queue.SimpleQueue[Span] = queue.SimpleQueue()
        self._received = received
        self.services: set[str] = set()
        services = self.services

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in request.resource_spans:
                    services.update(
                        pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"
                    )
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            received.put(span)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def spans(self) -> dict[str, Span]:
        found: dict[str, Span] = {}
        while not self._received.empty():
            span = self._received.get()
            found[span.name] = span
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}
