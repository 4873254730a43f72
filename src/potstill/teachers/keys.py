"""API keys: read from the environment or a file, and kept out of everything that is written."""

import os
from pathlib import Path

from potstill.errors import ConfigError

HIDDEN = "[key]"


class Key:
    """A secret that does not show itself: not in repr, not in a traceback of it, not in what `scrub` returns."""

    __slots__ = ("_value",)

    def __init__(self, value: str | None):
        self._value = value

    def __repr__(self) -> str:
        return HIDDEN if self._value else "[no key]"

    def reveal(self) -> str | None:
        """For the Authorization header, and nothing else."""
        return self._value

    def scrub(self, text: str) -> str:
        """The text without the key, which servers like to repeat in their error messages."""
        return text.replace(self._value, HIDDEN) if self._value else text


def read_key(env: str | None, file: Path | None, usual: tuple[str, ...], *, needed: bool) -> Key:
    """The key from `file`, from the variable `env`, or from the provider's usual variables. Raises ConfigError."""
    if file is not None:
        try:
            text = file.expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"teacher.key_file = {str(file)!r} cannot be read: {error.strerror}. Give a file that holds the API key"
            ) from None
        if not text or len(text.split()) != 1:
            raise ConfigError(f"teacher.key_file = {str(file)!r} should hold one API key and nothing else")
        return Key(text)
    names = (env,) if env else usual
    for name in names:
        if value := os.environ.get(name, "").strip():
            return Key(value)
    if needed or env:
        raise ConfigError(
            f"the teacher needs an API key, but {' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set. "
            "Set it in the environment, or name another variable (teacher.key_env) or a file (teacher.key_file)"
        )
    return Key(None)
