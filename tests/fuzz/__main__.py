"""Fuzzes one target, guided by coverage: `python -m tests.fuzz TARGET [options of libFuzzer] [FOLDER]`.

What is learnt goes into the folder, which is made; the seeds that are committed are read besides. With files instead of
a folder, these alone are tried.
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
    places = [Path(option) for option in options if not option.startswith("-")]
    if not any(place.is_file() for place in places):
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        options.append(str(SEEDS / name))
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
