"""What Ray Serve costs: the same model by Headrace alone, by Headrace on Ray, and by Ray Serve with its own batching.

    python benchmarks/ray_overhead.py --output DIR

It is `servers/compare.py` with these servers, one replica each, and requests of one row (750,000 bytes) over 1, 8 and
64 connections; further options are passed on. On Ray each runs twice: with HAProxy and servers inside the replicas
(RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1), and as it is installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMPARE = Path(__file__).parent / "servers" / "compare.py"
SERVERS = ("null", "headrace", "headrace-on-ray", "ray", "headrace-on-ray-default", "ray-default")
LOADS = ("--model", "tiny", "--connections", "1", "8", "64", "--large-connections")


def main() -> int:
    command = [sys.executable, str(COMPARE), "--servers", *SERVERS, *LOADS, *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
