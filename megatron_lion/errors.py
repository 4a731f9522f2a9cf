"""Exception classes, one for each kind of failure that a user can fix, and their exit codes.

Their messages are one line: what happened, what is needed, what to run. The command line prints the line and exits with
`exit_code`; no other function calls sys.exit to report an error. `assert` is only for errors in this project's code.
"""


class MegatronLionError(Exception):
    """Base class of errors that a user can fix.

    Attributes:
        exit_code: process exit status; the table is in docs/exit-codes.md.
        told_by: rank that prints the message if all ranks raise the error together; None leaves the choice to the command line.
    """

    exit_code = 1
    told_by: int | None = None


class ConfigError(MegatronLionError):
    """A setting, a flag or a combination of settings is invalid (exit code 2)."""

    exit_code = 2


class DataError(MegatronLionError):
    """A corpus, vocabulary or token file is missing, damaged or does not fit, or holds nothing to measure (exit code 3)."""

    exit_code = 3


class CheckpointError(MegatronLionError):
    """A checkpoint or run folder is damaged, foreign or of another shape (exit code 4)."""

    exit_code = 4


class StorageError(MegatronLionError):
    """The file system refused: no space left, no permission, read-only (exit code 5)."""

    exit_code = 5


class NumericsError(MegatronLionError):
    """Gradients, loss or training state are NaN or infinite, so that no step can be taken (exit code 6)."""

    exit_code = 6


class BusyError(MegatronLionError):
    """Another process is writing the same run folder (exit code 7)."""

    exit_code = 7


class PeerError(MegatronLionError):
    """Another rank was lost or did not answer in time (exit code 8).

    Attributes:
        lost: the ranks at fault, as far as they are known.
    """

    exit_code = 8
    lost: tuple[int, ...] = ()


class WorkerError(PeerError):
    """A loader worker of this rank was killed or sent no batch in time (exit code 8)."""


class EnvironmentFault(MegatronLionError):
    """A required package, device, version or memory is missing, or processes cannot communicate (exit code 9)."""

    exit_code = 9


class StoppedOnRequest(MegatronLionError):
    """A signal asked the job to stop; a checkpoint or finished parts were saved, if there were any (exit code 75)."""

    exit_code = 75
