"""Errors for the person who can fix them.

One exception, one line: what was found, where, what was expected, what to do. The command line prints it and exits
with status 2; a library user can catch `MMError` or the kind of it that matters.
"""


class MMError(Exception):
    """Something that the user, not a developer of this framework, can put right."""


class ConfigError(MMError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(MMError):
    """Data is missing, damaged, or made for another model."""


class CheckpointError(MMError):
    """A checkpoint is missing, incomplete, or belongs to another model or run."""
