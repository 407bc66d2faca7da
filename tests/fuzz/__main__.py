"""Fuzzes one target, guided by coverage: `python -m tests.fuzz TARGET [options and corpus folders of libFuzzer]`.

A corpus folder that is not there is made; the seeds that are committed are read besides.
"""

import sys
from pathlib import Path

import atheris

SEEDS = Path(__file__).parent / "corpus"
MODULES = ["headrace.wire", "headrace.frontend.http", "headrace.door_messages"]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with atheris.instrument_imports(include=MODULES):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415  instrumented by being imported here
    name, *options = sys.argv[1:]
    if name not in TARGETS:
        sys.exit(f"there is no target {name}; there are {', '.join(TARGETS)}")
    folders = [Path(option) for option in options if not option.startswith("-")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    given = [sys.argv[0], *options, str(SEEDS / name)]
    atheris.Setup(given, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
