"""Every error a user can meet. Catch broad or narrow:

    EdgeCompressError                 exit code 1
    ├── UsageError                    exit code 2: the call is wrong
    │   ├── UnknownNameError          a name that is not in a registry; says the nearest known one
    │   ├── BadDataError              images, labels or splits that cannot be used
    │   ├── BadModelError             a network, checkpoint or ONNX file that cannot be used
    │   └── BadFileError              a run folder, table, policy or artifact that is missing, broken or of another schema
    ├── GoalMissedError               exit code 3: a budget, an accuracy drop or a parity gate was missed
    └── MissingBackendError           exit code 4: a runtime that is needed is not installed or has no device

A message is one sentence that says what, where, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeCompressError(Exception):
    """Base of all errors that edgecompress raises on purpose."""

    exit_code = 1


class UsageError(EdgeCompressError):
    """The call is wrong: an option, a value, a file that the user named."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry knows.

    Args:
        kind: what the name stands for, for example ``"target"``.
        name: what the user wrote.
        known: all names that would have worked.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")


class BadDataError(UsageError):
    """Images, labels or splits that cannot be used."""


class BadModelError(UsageError):
    """A network, checkpoint or ONNX file that cannot be used."""


class BadFileError(UsageError):
    """A run folder, table, policy or artifact that is missing, broken or written by another schema version."""


class DivergedError(EdgeCompressError):
    """A training whose loss or gradients are no longer finite."""


class GoalMissedError(EdgeCompressError):
    """A budget, an accuracy drop or a parity gate was missed."""

    exit_code = 3


class MissingBackendError(EdgeCompressError):
    """A runtime that is needed is not installed here, or its device is absent."""

    exit_code = 4
