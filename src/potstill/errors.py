"""What can go wrong, and whose turn it is.

    PotstillError                 exit code 2: the message says what, why, and what to do instead
    ├── ConfigError(ValueError)   a recipe or an argument
    ├── DataError(ValueError)     a data set or a verifier's input
    ├── ModelError                a student or teacher that cannot be loaded, or a pair that cannot work together
    ├── TeacherError              a teacher's answer that cannot be used
    │   └── BudgetEnded           not an error: the recipe's limit on what the teacher may cost is reached
    ├── TrainingError             a step that cannot go on (a loss that is not a number, a full disk)
    ├── CheckpointError           a run or checkpoint that cannot be read
    └── Interrupted               not an error: the user stopped the run (exit code 130)

Anything else that reaches the command line is our fault: exit code 1, with a traceback.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'edit'? ", or "" where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def require(module: str, extra: str, feature: str) -> None:
    """Raise ConfigError if an optional package is not installed, naming the extra that brings it."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{feature} needs {module}, which is not installed. Install it: pip install 'potstill[{extra}]'"
        )


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """ "there is no method 'odp'; did you mean 'opd'? There are: omniopd, opd" """
    names = sorted(known)
    near = did_you_mean(word, names)
    return f"there is no {what} {word!r}{'; ' + near if near else '. '}There are: {', '.join(names)}"


class PotstillError(Exception):
    """Base of every error that a user can put right."""

    exit_code = 2


class Interrupted(PotstillError):
    """The user stopped a run; its state is saved."""

    exit_code = 130


class ConfigError(PotstillError, ValueError):
    """A recipe, a field or a combination of fields that cannot work."""


class DataError(PotstillError, ValueError):
    """A data set that is empty, unreadable or lacks a column."""


class ModelError(PotstillError):
    """A model that cannot be loaded, or a student and a teacher that do not fit together."""


class TeacherError(PotstillError):
    """An answer of the teacher that cannot be used."""


class BudgetEnded(TeacherError):
    """The recipe's limit on what the teacher may cost. `said` are the answers of the step that were complete by then."""

    def __init__(self, message: str, said: Sequence[Any] = ()):
        super().__init__(message)
        self.said = tuple(said)


class TrainingError(PotstillError):
    """A run that cannot go on."""


class CheckpointError(PotstillError):
    """A run directory or checkpoint that is missing, incomplete or damaged."""
