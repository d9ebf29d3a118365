"""What a user can mend: one base class and a kind for each part of the system.

The command line prints the message alone and exits 2. A message says what went wrong, where,
what was found, what was wanted, and what to do. Anything else that is raised is our own bug.
"""

import difflib
from collections.abc import Iterable


class LascauxError(Exception):
    """Something the user can mend; the message is all they need to read."""


class ConfigError(LascauxError):
    """A setting: its key and origin, the value, what is accepted, the closest known key."""


class DataError(LascauxError):
    """A source, a tokenizer or a shard: the file, the record or offset, what was expected."""


class CheckpointError(LascauxError):
    """A checkpoint or a run folder: path, step, tensor, saved against wanted."""


class RequestError(LascauxError):
    """A generation request: the field, the value, the range that is allowed."""


class ProcessLost(LascauxError):
    """Another process of the job ended or does not answer."""


class TrainingStopped(LascauxError):
    """A run that ended before its last step and can be continued (exit 75)."""


def suggest(word: str, known: Iterable[str]) -> str:
    """A "did you mean" ending for an unknown word, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
