"""A model as a Serve application: what `headrace deploy` runs, and what a Serve config file's import_path names.

import_path: headrace.ray_serve.application:build
args: {source: "my_model.py:build", name: mine, max_batch_size: 16, gpus: 1}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.config import require
from headrace.model_options import MAX_BATCH_SIZE, default_name
from headrace.ray_serve.deployment import deployment_options, http_deployment
from headrace.serve_config import QUEUE_BATCHES

if TYPE_CHECKING:
    from ray.serve import Application

_QUEUED = "max_queued_requests"


def build(args: dict[str, Any]) -> Application:
    """Return the application that the args of a Serve config file describe; see `application`."""
    return application(args, {})


def application(args: Mapping[str, Any], changes: Mapping[str, Any]) -> Application:
    """Return the application of a model: `source` and its options, as `[[models]]` has them.

    `args` may also say what a replica takes, `gpus` and `cpus`, and `max_body_bytes`.
    Without `gpus`, a replica has one, or none with device "cpu". `changes` are options of the deployment that take the
    place of ours. Raises InvalidOption without a source.
    """
    words = dict(args)
    require(bool(words.get("source")), "source is missing in args, which says what to serve, as my_model.py:build")
    source = str(words.pop("source"))
    gpus = float(words.pop("gpus", 0 if words.get("device") == "cpu" else 1))
    cpus = float(words.pop("cpus", 1))
    batch = int(words.get("max_batch_size") or max(words.get("buckets") or (MAX_BATCH_SIZE,)))
    options = deployment_options(gpus=gpus, cpus=cpus, max_batch_size=batch, lanes=words.get("num_workers"))
    options[_QUEUED] = QUEUE_BATCHES * batch
    options["backpressure_config"] = {"status_code": 503, "retry_after_s": 1}
    deployment = http_deployment(str(words.get("name") or default_name(source)))
    return deployment.options(**{**options, **changes}).bind(source, **words)
