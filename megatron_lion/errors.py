"""One exception class per thing the user can do about a failure, and the exit code it ends with.

Raise these with a one-line message that says what was given, what is needed and what to type. The
command line prints that line and leaves with `exit_code`; nothing else in the project calls sys.exit.
Use `assert` only for mistakes of our own.
"""


class MegatronLionError(Exception):
    """Base of every error that a user can mend.

    Attributes:
        exit_code: process exit status; see docs/exit-codes.md for the table.
        told_by: rank that tells the user of it where all ranks raise it together; None where each speaks for itself.
    """

    exit_code = 1
    told_by: int | None = None


class ConfigError(MegatronLionError):
    """A setting, flag or combination of settings is impossible (exit code 2)."""

    exit_code = 2


class DataError(MegatronLionError):
    """A corpus, vocabulary or token file is missing, damaged or does not fit (exit code 3)."""

    exit_code = 3


class CheckpointError(MegatronLionError):
    """A checkpoint or run folder is damaged, foreign or of another shape (exit code 4)."""

    exit_code = 4


class StorageError(MegatronLionError):
    """The file system refused: no space left, no permission, read-only (exit code 5)."""

    exit_code = 5


class NumericsError(MegatronLionError):
    """Gradients or loss stayed NaN or infinite, so that no step could be taken (exit code 6)."""

    exit_code = 6


class BusyError(MegatronLionError):
    """Another process is writing the same run folder (exit code 7)."""

    exit_code = 7


class PeerError(MegatronLionError):
    """Another rank was lost or did not answer in time (exit code 8)."""

    exit_code = 8


class EnvironmentFault(MegatronLionError):
    """A package, device or version that is needed is not there (exit code 9)."""

    exit_code = 9


class StoppedOnRequest(MegatronLionError):
    """A signal asked the job to stop; a checkpoint was saved first (exit code 75)."""

    exit_code = 75
