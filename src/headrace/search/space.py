"""The options that are searched through: their values, read and refused, and the usual ones of a device. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product

from headrace.config import PRECISIONS, Precision, require
from headrace.errors import InvalidOption

DELAYS_US = (0, 500, 2000)
DELAY_SHARE = 0.25  # of the bound: waiting longer for a batch leaves too little for the rest
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # largest buckets
FORM = "write it as KEY=VALUE,VALUE,..., as workers=1,2,4"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Choice:
    """One value of each option that is searched through."""

    workers: int = 1  # lanes
    max_batch_size: int = 32  # rows of the largest bucket
    max_queue_delay_us: int = 0
    precision: Precision = "tf32"
    compile: bool = False

    def __str__(self) -> str:
        return (
            f"workers={self.workers} max_batch_size={self.max_batch_size} max_queue_delay_us={self.max_queue_delay_us}"
            f" precision={self.precision} compile={_word(self.compile)}"
        )

    @property
    def model_form(self) -> tuple[Precision, bool]:
        """What the model is made into, whatever batches it is given."""
        return self.precision, self.compile


KEYS: tuple[str, ...] = tuple(field.name for field in fields(Choice))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The values that each option may have, in order; the first of each are the usual ones."""

    workers: tuple[int, ...]
    max_batch_size: tuple[int, ...]
    max_queue_delay_us: tuple[int, ...] = DELAYS_US
    precision: tuple[Precision, ...] = ("tf32",)
    compile: tuple[bool, ...] = (False,)

    def values(self) -> dict[str, tuple[int | str, ...]]:
        """Return the values by option, `compile` as 0 and 1."""
        return {key: getattr(self, key) for key in KEYS}

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.values().values())

    def choices(self) -> Iterator[Choice]:
        """Yield every combination."""
        for values in product(*(getattr(self, key) for key in KEYS)):
            yield Choice(**dict(zip(KEYS, values, strict=True)))

    def simplest(self, precision: Precision, *, compiled: bool) -> Choice:
        """Return the options that answer one request by itself soonest."""
        return Choice(
            workers=min(self.workers),
            max_batch_size=min(self.max_batch_size),
            max_queue_delay_us=min(self.max_queue_delay_us),
            precision=precision,
            compile=compiled,
        )


def usual_space(device_kind: str, cpus: int, batch_size: int, p99_s: float) -> Space:
    """Return what is worth trying on "cpu" or "cuda". Requests have `batch_size` rows.

    On a CPU lanes share the cores, so few of them and no compilation, which costs a CPU minutes; there 8-bit forms and
    fp16 are slow. On a GPU many lanes of small batches, and forms that tensor cores like.
    """
    batches = tuple(rows for rows in BATCHES if rows > batch_size)
    delays = tuple(delay for delay in DELAYS_US if delay <= DELAY_SHARE * p99_s * 1e6)
    if device_kind == "cpu":
        workers = tuple(count for count in (1, 2, 4, 8) if count <= max(1, cpus))
        return Space(
            workers=workers,
            max_batch_size=(batch_size, *batches[:4]),
            max_queue_delay_us=delays,
            precision=("float32", "bf16"),
        )
    return Space(
        workers=(4, 1, 2, 8, 16),
        max_batch_size=(batch_size, *batches),
        max_queue_delay_us=delays,
        precision=("tf32", "bf16", "fp16"),
        compile=(False, True),
    )


def restricted(space: Space, texts: Sequence[str], batch_size: int) -> Space:
    """Return the space with the values of `--search KEY=VALUE,...`. Raises InvalidOption."""
    given: dict[str, tuple[int | str, ...]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        key = {"max_queue_delay": "max_queue_delay_us"}.get(key.replace("-", "_"), key.replace("-", "_"))
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(KEYS)}"
            raise InvalidOption(f"--search {text}: there is no such key; {hint}")
        words = [word.strip() for word in listed.split(",")]
        require(bool(equals) and all(words), f"--search {text}: {FORM}")
        require(key not in given, f"--search {text}: {key} is given twice; list all its values at once")
        values = tuple(_value(key, word, text) for word in words)
        require(len(set(values)) == len(values), f"--search {text}: a value stands twice")
        given[key] = values
    merged = Space(**{**space.values(), **given})  # type: ignore[arg-type]  # each value was read as its key's kind
    small = [rows for rows in merged.max_batch_size if rows < batch_size]
    require(
        not small,
        f"--search max_batch_size={','.join(map(str, small))}: below --batch-size {batch_size}, the rows of a request",
    )
    return merged


def _value(key: str, word: str, text: str) -> int | str:
    if key == "precision":
        require(word in PRECISIONS, f"--search {text}: precisions are {', '.join(PRECISIONS)}")
        return word
    if key == "compile":
        require(word in ("on", "off"), f"--search {text}: compile is on or off")
        return word == "on"
    least = 0 if key == "max_queue_delay_us" else 1
    most = 3_600_000_000 if key == "max_queue_delay_us" else 65_536
    require(
        word.isdecimal() and least <= int(word) <= most,
        f"--search {text}: {word} is not a whole number of {least} to {most}",
    )
    return int(word)


def _word(on: bool) -> str:
    return "on" if on else "off"
