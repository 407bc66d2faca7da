"""One run as one CSV row: the published columns first, under their published names, ours after."""

from __future__ import annotations

from headrace.bench.summary import RunSummary

PUBLISHED = (
    "batch_size",
    "compile",
    "torch_load_time",
    "m_compile_time",
    "warmup_latency",
    "average_latency",
    "max_latency",
    "min_latency",
    "throughput",
    "gpu_util",
)
ACTIVITY = (
    "sm_activity_pct",
    "sm_occupancy_pct",
    "tensor_activity_pct",
    "dram_activity_pct",
    "pcie_rx_bytes_per_s",
    "pcie_tx_bytes_per_s",
    "gpu_memory_used_bytes",
    "power_w",
    "sm_clock_mhz_mean",
    "cpu_utilization_pct",
)
OURS = (
    "experiment",
    "design",
    "num_workers",
    "transport",
    "num_iters",
    "warmup_iters",
    "device",
    "model",
    "precision",
    "input",
    "image_size",
    "requests",
    "errors",
    "wrong",
    "unanswered",
    "p50_response_s",
    "p90_response_s",
    "p99_response_s",
    "mean_service_s",
    "p50_service_s",
    "p99_service_s",
    "window_s",
    *ACTIVITY,
    "max_answer_error",
    "gpu_name",
    "gpu_driver",
    "torch",
    "git_revision",
    "started_at",
    "marks",
    "error",
)
COLUMNS = PUBLISHED + OURS


def row(summary: RunSummary) -> dict[str, object]:
    """Return the value of every column; None where the run or the machine does not say.

    `torch_load_time` is reading the weights onto the device; `m_compile_time` is wrapping the model for compilation,
    which happens at the first forward, as published.
    """
    return _published(summary) | _options(summary) | _measured(summary) | _where(summary)


def _published(summary: RunSummary) -> dict[str, object]:
    metrics, parts = summary.metrics, summary.warmup_parts_s
    response = metrics.response_time
    return {
        "batch_size": summary.options.inputs.batch_size,
        "compile": summary.options.model.compile,
        "torch_load_time": parts.get("weights"),
        "m_compile_time": parts.get("compile wrap"),
        "warmup_latency": metrics.warmup_latency_s,
        "average_latency": response and response.mean,
        "max_latency": response and response.max,
        "min_latency": response and response.min,
        "throughput": metrics.throughput_samples_per_s,
        "gpu_util": summary.activity.gpu_utilization_pct,
    }


def _options(summary: RunSummary) -> dict[str, object]:
    options = summary.options
    return {
        "experiment": summary.experiment,
        "design": options.design.name if options.target is None else options.target.scheme,
        "num_workers": options.design.num_workers,
        "transport": options.transport.name,
        "num_iters": options.load.num_iters,
        "warmup_iters": options.load.warmup_iters,
        "device": options.device,
        "model": options.model.name,
        "precision": options.precision,
        "input": "files" if options.inputs.files else options.inputs.kind,
        "image_size": options.inputs.image_size,
    }


def _measured(summary: RunSummary) -> dict[str, object]:
    metrics, activity = summary.metrics, summary.activity
    response, service = metrics.response_time, metrics.service_time
    return {
        "requests": metrics.requests,
        "errors": metrics.errors,
        "wrong": metrics.wrong,
        "unanswered": metrics.unanswered,
        "p50_response_s": response and response.p50,
        "p90_response_s": response and response.p90,
        "p99_response_s": response and response.p99,
        "mean_service_s": service and service.mean,
        "p50_service_s": service and service.p50,
        "p99_service_s": service and service.p99,
        "window_s": metrics.window_s,
        "max_answer_error": summary.answers and summary.answers.max_error,
    } | {name: getattr(activity, name) for name in ACTIVITY}


def _where(summary: RunSummary) -> dict[str, object]:
    environment = summary.environment
    return {
        "gpu_name": environment.gpu_name,
        "gpu_driver": environment.gpu_driver,
        "torch": summary.torch and summary.torch.torch,
        "git_revision": environment.git_revision,
        "started_at": summary.started_at,
        "marks": "; ".join(summary.marks) or None,
        "error": summary.error,
    }
