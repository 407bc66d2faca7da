"""Sampled requests as OpenTelemetry's spans, sent to a collector by a thread. Nothing else needs its packages.

A request's spans are made at once when it has ended, from the stamps that it has anyway: until then tracing costs the
decision whether to sample it, and nothing of those that are not. Source: OpenTelemetry, trace SDK; W3C Trace Context.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace import __version__
from headrace.addresses import traces_url
from headrace.clock import now_ns
from headrace.frontend.tracing import Trace

if TYPE_CHECKING:
    from headrace.frontend.tracing import Outcome
    from headrace.frontend_job import TracingSettings

QUEUE_SPANS = 4096  # that wait to be sent; beyond them the oldest are dropped
# Encoding holds the interpreter's lock, which requests wait for: few at a time, so that none waits long.
EXPORT_SPANS = 64
PARENT, STATE = "traceparent", "tracestate"
LIBRARY = "opentelemetry"
TELLING = ("opentelemetry.exporter", "opentelemetry.sdk")  # whose warnings mean that spans are lost, or may be


class Tracer:
    """Decides what is sampled, and sends it. Used on one event loop; `tell` is called from any thread, once at most.

    A request whose caller says whether it is sampled follows its caller; of the others it is `ratio`.
    """

    def __init__(self, settings: TracingSettings, tell: Callable[[str], None]) -> None:
        self._ratio = settings.ratio
        self._wall_ns = time.time_ns() - now_ns()  # from the one clock to the wall's, which is not asked again
        self._propagator = TraceContextTextMapPropagator()
        log = logging.getLogger(LIBRARY)  # whose warnings are told rather than logged
        log.addHandler(logging.NullHandler())
        log.propagate = False
        exporter = make_exporter(settings)
        log.addHandler(_First(lambda reason: tell(_lost(settings.endpoint, reason))))
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUE_SPANS,
                max_export_batch_size=EXPORT_SPANS,
            )
        )
        self._tracer = self._provider.get_tracer("headrace", __version__)

    def sampled(self, headers: Mapping[str, str]) -> Context | None:
        """Return what a request's span is part of, empty for a trace of its own; None: it is not sampled.

        `headers`, their names in lower case, hold what its caller says of traces.
        """
        if PARENT in headers:
            carrier = {name: headers[name] for name in (PARENT, STATE) if name in headers}
            context = self._propagator.extract(carrier, Context())
            parent = get_current_span(context).get_span_context()
            if parent.is_valid:
                return context if parent.trace_flags.sampled else None
        return Context() if random.random() < self._ratio else None  # noqa: S311  no secret

    @contextmanager
    def request(self, context: Context, outcome: Callable[[Trace], Outcome]) -> Iterator[Trace]:
        """Yield what a sampled request is to fill in; at its end `outcome` describes it.

        An error that leaves the context is the request's, unless it has one already.
        """
        trace = Trace(now_ns())
        try:
            yield trace
        except BaseException as error:
            trace.error = trace.error or error
            raise
        finally:
            self._make_spans(trace, context, outcome(trace))

    def close(self) -> threading.Thread:
        """Send what waits to be sent; return the thread that does, which may be left behind."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        return thread

    def _make_spans(self, trace: Trace, context: Context, outcome: Outcome) -> None:
        wall_ns = self._wall_ns
        span = self._tracer.start_span(
            outcome.name, context, SpanKind.SERVER, dict(outcome.attributes), start_time=trace.began_ns + wall_ns
        )
        if outcome.has_failed:
            span.set_status(Status(StatusCode.ERROR, outcome.description))
        within = set_span_in_context(span, Context())
        for stage, (began_ns, ended_ns) in trace.stages().items():
            part = self._tracer.start_span(stage, within, start_time=began_ns + wall_ns)
            part.end(ended_ns + wall_ns)
        span.end(now_ns() + wall_ns)


def make_exporter(settings: TracingSettings) -> OTLPSpanExporter:
    """Return what sends spans; OTEL_EXPORTER_OTLP_* say what the settings do not."""
    return OTLPSpanExporter(endpoint=traces_url(settings.endpoint))


def _resource() -> Resource:
    """Return what the spans are of; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before what we say."""
    ours: dict[str, str | int] = {
        "service.name": "headrace",
        "service.version": __version__,
        "process.pid": os.getpid(),
    }
    return Resource.create({**ours}).merge(OTELResourceDetector().detect())


def _lost(endpoint: str, reason: str) -> str:
    return (
        f"traces do not all get to {endpoint}; requests are served all the same. See that a collector listens there, or"
        f" trace fewer. The first reason: {reason}"
    )


class _First(logging.Handler):
    """Tells the first warning that is about sending, and no other."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell
        self._has_told = False

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if not self._has_told and record.name.startswith(TELLING):
            self._has_told = True
            self._tell(record.getMessage())
