"""A collector of traces: takes them over OTLP/HTTP, and keeps what it has decoded."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Collector:
    """A context. `silent`: it reads what comes, and answers only once the context ends."""

    def __init__(self, *, silent=False):
        self.spans = []
        self.resources = []
        self._changed = threading.Condition()
        self._answers = threading.Event()
        if not silent:
            self._answers.set()
        handler = type("Handler", (_Handler,), {"collector": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._answers.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, path, body):
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource))
                self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self._changed.notify_all()
        self._answers.wait()

    def wait_for(self, spans, within_s=30):
        """Wait until at least so many spans have come; return all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.spans) >= spans, within_s), self.spans
            return list(self.spans)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.collector.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        body = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def attributes(of):
    """Return a span's or a resource's attributes as a dict."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}
