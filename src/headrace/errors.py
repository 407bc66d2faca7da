"""Every error that a user can meet: one class per remedy.

The message says the value, the limit and what to do. `http_status` and `grpc_code` are what a server answers with;
`exit_code` is what a command ends with.
"""


class HeadraceError(Exception):
    """Base of all errors that are the user's to read; anything else is our own bug."""

    exit_code = 1
    http_status = 500
    grpc_code = "INTERNAL"


class InvalidOption(HeadraceError):
    """An option, or a combination of options, that cannot work; nothing was started."""

    exit_code = 2
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class DeviceUnavailable(HeadraceError):
    """The device asked for is not there."""

    exit_code = 2
    http_status = 503
    grpc_code = "UNAVAILABLE"


class ModelError(HeadraceError):
    """The model cannot be built, loaded or run."""

    http_status = 400
    grpc_code = "FAILED_PRECONDITION"


class CheckpointError(ModelError):
    """The checkpoint is missing, damaged, or of another model."""


class InputError(HeadraceError):
    """The payload cannot be made: no photographs, too little memory, an unreadable file."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class TransportFailed(HeadraceError):
    """A batch or an answer could not cross between processes, for want of shared memory or descriptors."""

    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"


class PeerGone(TransportFailed):
    """The process at the other end has ended; what it held is lost, and the caller is told."""

    grpc_code = "UNAVAILABLE"


class InvalidRequest(HeadraceError):
    """A request that the model cannot take; nothing was copied or computed."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class UnknownModel(HeadraceError):
    """A request for a model, or a version of one, that is not served here."""

    http_status = 404
    grpc_code = "NOT_FOUND"


class NotOffered(HeadraceError):
    """A part of the protocol that this server does not have, or that is switched off."""

    http_status = 400
    grpc_code = "UNIMPLEMENTED"


class Unavailable(HeadraceError):
    """The server cannot serve now; later it may."""

    http_status = 503
    grpc_code = "UNAVAILABLE"


class QueueFull(Unavailable):
    """There is no room for a request now; nothing was copied or computed. Try again later."""


class NotReady(Unavailable):
    """No backend is ready."""


class Unreachable(Unavailable):
    """No server answers where a client looks for one; nothing was taken."""


class DeadlineExceeded(HeadraceError):
    """A request waited longer than it allowed; it was not computed."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Cancelled(HeadraceError):
    """A request whose client left before it was computed. 499 is what servers log for that: nobody reads the answer."""

    http_status = 499
    grpc_code = "CANCELLED"


class EngineStopped(Unavailable):
    """The engine takes no requests: it was stopped, or its device is lost. Start a new one."""


class OutputError(HeadraceError):
    """A result file cannot be written, or an old one does not fit."""


class RunFailed(HeadraceError):
    """The run began and did not end well: a request failed, a process died, nothing answered."""


class WrongAnswers(RunFailed):
    """The server answered, and the answers are not the model's."""


class IncomparableRuns(HeadraceError):
    """Runs whose difference would say nothing, because more than the thing compared differs."""

    exit_code = 2


class MissingExtra(HeadraceError, ImportError):
    """An optional part of Headrace is asked for, and what it needs is not installed."""

    exit_code = 2
