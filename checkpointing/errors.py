"""What can go wrong in checkpointing, as one tree.

CheckpointError
├── StateError        what was given to be saved cannot be: names the key and says what to do
├── SaveError         a save could not be written or committed; the checkpoints before it are intact
│   ├── NotBegunError     another rank had an older error to raise first
│   └── PassedOverError   the policy for a busy checkpointer skipped it, or replaced it by a later one
├── IntegrityError    bytes on disk are not what was saved: names the file, and the tensor where there is one
│   └── VersionError  a checkpoint of a newer version of longrail; nothing is wrong with it
├── FormatError       what was given is not a checkpoint of a format we read, or cannot be written as the one asked for
└── RankError         a rank did not report in time, or the ranks did not make the same call
"""


class CheckpointError(Exception):
    """Base of everything checkpointing raises on purpose."""


class StateError(CheckpointError):
    """What was given to be saved cannot be; the message names the key and says what to do."""


class SaveError(CheckpointError):
    """A save could not be written or committed; the checkpoints before it are intact."""


class NotBegunError(SaveError):
    """Another rank had an older error to raise first, and raised that instead of saving."""


class PassedOverError(SaveError):
    """The policy for a busy checkpointer skipped this save, or replaced it by a later one."""


class IntegrityError(CheckpointError):
    """Bytes on disk are not what was saved; the message names the file, and the tensor where there is one."""


class VersionError(IntegrityError):
    """A checkpoint was written by a newer version; nothing is wrong with it, and it is never set aside."""


class FormatError(CheckpointError):
    """What was given is not a checkpoint we read, or cannot be written in the format asked for; says which and why."""


class RankError(CheckpointError):
    """A rank did not report in time, or the ranks did not make the same call; the message names the ranks."""


def is_damage(error: IntegrityError) -> bool:
    """Return whether the bytes were read and are wrong, or are gone; not that they could not be read just now."""
    cause = error.__cause__
    while isinstance(cause, CheckpointError):
        cause = cause.__cause__
    return not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
