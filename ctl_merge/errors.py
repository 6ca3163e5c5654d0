"""The errors that are the user's to fix.

    CtlMergeError
    ├── RecipeError        the recipe cannot be understood: syntax, keys, values
    ├── CheckpointError    a checkpoint cannot be read: missing, truncated, corrupt, refused
    ├── HubError           the Hub does not give what was asked: network, rights, repository, revision
    ├── MismatchError      checkpoints that cannot be merged with each other
    ├── NonFiniteError     NaN or infinity where a number was due
    ├── DeviceError        a device that is not there or cannot hold the work
    ├── DataError          texts for a probe that cannot be read or do not suffice
    ├── ProbeError         models whose blocks cannot be found or run
    └── OutputError        the output cannot be written: exists, locked, disk full

The command line catches the root only, prints the message and exits with 2; anything else is a bug and keeps its
traceback. A message says what is wrong, where, and what to do next.
"""


class CtlMergeError(Exception):
    """Root of all errors that the user can fix; never raised itself."""

    agreed = False  # whether all processes of a run raise it


class RecipeError(CtlMergeError):
    """The recipe cannot be understood. Lists every problem found, each with its place in the file."""


class CheckpointError(CtlMergeError):
    """A checkpoint cannot be read."""


class HubError(CtlMergeError):
    """The Hub does not give what was asked of it."""


class MismatchError(CtlMergeError):
    """Checkpoints that cannot be merged with each other."""


class NonFiniteError(CtlMergeError):
    """NaN or infinity in an input or in the merged result."""


class DeviceError(CtlMergeError):
    """A device that is not there, or cannot hold the work."""


class DataError(CtlMergeError):
    """Texts that cannot be read, or do not suffice."""


class ProbeError(CtlMergeError):
    """Models whose blocks cannot be found, or that cannot be run in step."""


class OutputError(CtlMergeError):
    """The output cannot be written."""
