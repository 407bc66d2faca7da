"""Every seed, and what was once found, passes its target; and some seconds of fuzzing find nothing new.

`make fuzz` goes on for as long as FUZZ_S says, and keeps what it learns.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent
SEEDS = sorted((HERE / "corpus").glob("*/*"))
RUNS = {"http_connection": 300}  # each is a whole front, with an event loop
MOST_RUNS = 5000
LIMITS = ("-timeout=10", "-rss_limit_mb=1024", "-max_len=4096")  # s and MB of one input
has_fuzzer = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has wheels for Linux on x86-64"
)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_seed_passes(seed):
    TARGETS[seed.parent.name](seed.read_bytes())


def test_every_target_has_seeds():
    assert {seed.parent.name for seed in SEEDS} == set(TARGETS)


@has_fuzzer
@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_finds_nothing(name, tmp_path):
    options = ("-seed=1", f"-runs={RUNS.get(name, MOST_RUNS)}", *LIMITS, f"-artifact_prefix={tmp_path}/")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, *options, str(tmp_path / "corpus")],
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        check=False,
    )
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert (done.returncode, found) == (0, {}), done.stderr[-4000:]
    assert "Done" in done.stderr
