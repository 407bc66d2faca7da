"""What supervisor, backends and frontends of a server say to each other. No torch: all of them import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.errors import HeadraceError
from headrace.tensors import TensorSpec
from headrace.transport.pair import RingPair

# Triton's names, of its repository index.
VersionState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
Verb = Literal["load", "unload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What clients are told of a model."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int  # rows of one request, and of one batch
    lanes: int = 1  # of each engine


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionStatus:
    """How a version of a model is."""

    name: str
    version: str  # empty: whatever versions there will be
    state: VersionState
    reason: str = ""  # why it is not ready, without paths of ours
    required: bool = False  # the server is not ready without it
    engines: int = 1  # that there should be
    engines_ready: int = 0

    @property
    def is_degraded(self) -> bool:
        """It serves, with fewer engines than there should be."""
        return 0 < self.engines_ready < self.engines


@dataclass(frozen=True, slots=True)
class BackendReady:
    """The backend's lanes are warm."""

    model: ServedModel
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attach:
    """To a backend: answer this client too."""

    ring: RingPair


@dataclass(frozen=True, slots=True)
class Stop:
    """To a backend: end when the clients have gone. To a frontend: take no more, answer what was taken, end."""


@dataclass(frozen=True, slots=True)
class Connect:
    """To a frontend: this version of a model is ready at the other end of this ring."""

    ring: RingPair
    model: ServedModel
    backend: int
    engine: int = 0  # which of the version's engines it is


@dataclass(frozen=True, slots=True)
class Retire:
    """To a frontend: send nothing more to this backend, and close its ring when it has answered the rest."""

    backend: int


@dataclass(frozen=True, slots=True)
class Retired:
    """From a frontend: the ring to this backend is closed."""

    backend: int


@dataclass(frozen=True, slots=True)
class Models:
    """To a frontend: all versions of all models. Comes after the words that made them so, and is answered by Seen."""

    serial: int
    versions: tuple[VersionStatus, ...]
    live: frozenset[int] = frozenset()  # the backends that requests may be sent to


@dataclass(frozen=True, slots=True)
class Seen:
    """From a frontend: all words up to and with these Models have been heeded."""

    serial: int


@dataclass(frozen=True, slots=True)
class Change:
    """From a frontend: a client wants a model loaded or unloaded. Answered by Changed, with the same number."""

    number: int
    verb: Verb
    name: str


@dataclass(frozen=True, slots=True)
class Changed:
    """To a frontend: all frontends have switched, or nothing has changed for this reason."""

    number: int
    error: HeadraceError | None


@dataclass(frozen=True, slots=True)
class Listening:
    """From a frontend: connections are accepted."""


@dataclass(frozen=True, slots=True)
class Notice:
    """From a frontend: something that the server's owner is to be told, once for all frontends that say it."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSpec:
    """A part of shared memory that a client made, and the name by which its requests mean it."""

    name: str
    key: str  # of the memory, as shm_open(3) has it
    offset: int = 0  # bytes
    byte_size: int


@dataclass(frozen=True, slots=True)
class ChangeRegions:
    """From a frontend: bring this to all frontends. To a frontend: make this change, and say so.

    Without `spec` the region `name` is forgotten, or all regions where that is None.
    """

    number: int  # the sender's own
    name: str | None
    spec: RegionSpec | None


@dataclass(frozen=True, slots=True)
class RegionsChanged:
    """From a frontend: it has made the change of this number, or could not. To a frontend: all have made its change."""

    number: int
    error: HeadraceError | None
