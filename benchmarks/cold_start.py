"""How long an engine takes to be ready, in fresh processes: `python benchmarks/cold_start.py --output cold_start.json`.

The first start compiles and keeps the programs; the others find them. Each is set against what no engine can do
without: importing torch and torchvision, a device context, and the weights on the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import time
begin = time.perf_counter()
import torch, torchvision
imported = time.perf_counter()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.zeros(1, device=device)
context = time.perf_counter()
torch.manual_seed(0)
model = torchvision.models.resnet18().eval().to(device)
torch.cuda.synchronize() if device == "cuda" else None
weights = time.perf_counter()
import json, sys
from headrace import Engine
options = json.loads(sys.argv[1])
side = options.pop("side")
example = torch.randn(1, 3, side, side)
options["buckets"] = tuple(options["buckets"])
if options["compile_cache"]:
    import pathlib
    options["compile_cache"] = pathlib.Path(options["compile_cache"])
engine = Engine(model, example, **options)
engine.start()
ready = time.perf_counter()
report = engine.report
engine.stop()
print(json.dumps({
    "import_s": imported - begin, "context_s": context - imported, "weights_s": weights - context,
    "engine_s": ready - weights, "ready_s": ready - begin, "ratio": (ready - begin) / (weights - begin),
    "parts_s": report.start_up_s, "notes": report.notes, "torch": torch.__version__,
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long an engine takes to be ready.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON, one object for each start")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="starts that find the programs (default: 3)"
    )
    parser.add_argument("--side", type=int, default=250, metavar="PIXELS")
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    found = []
    for buckets in ((32,), (1, 2, 4, 8, 16, 32)):
        with tempfile.TemporaryDirectory() as cache:
            common = {"side": args.side, "precision": args.precision, "buckets": buckets}
            cases = [("uncompiled", {"compile": False, "compile_cache": None})]
            cases += [("first", {"compile": True, "compile_cache": cache})]
            cases += [("later", {"compile": True, "compile_cache": cache})] * args.repeats
            for name, options in cases:
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, json.dumps(common | options)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr)
                line = json.loads(done.stdout.splitlines()[-1])
                found.append({"start": name, "buckets": buckets, "process_s": time.perf_counter() - began} | line)
                sys.stderr.write(
                    f"{name} {buckets}: ready after {line['ready_s']:.1f} s, {line['ratio']:.2f} of the base\n"
                )
                args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
