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
        except UnicodeDecodeError:
            raise ConfigError(
                f"teacher.key_file = {str(file)!r} is no text. Give a file that holds the API key"
            ) from None
        if not text or len(text.split()) != 1:
            raise ConfigError(f"teacher.key_file = {str(file)!r} should hold one API key and nothing else")
        return _sendable(text, f"teacher.key_file = {str(file)!r}")
    names = (env,) if env else usual
    for name in names:
        if value := os.environ.get(name, "").strip():
            return _sendable(value, f"the environment variable {name}")
    if needed or env:
        raise ConfigError(
            f"the teacher needs an API key, but {' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set. "
            "Set it in the environment, or name another variable (teacher.key_env) or a file (teacher.key_file)"
        )
    return Key(None)


def _sendable(value: str, where: str) -> Key:
    """The key, if a header can hold it. Raises ConfigError, which does not show it."""
    if all("!" <= c <= "~" for c in value):
        return Key(value)
    raise ConfigError(
        f"{where} holds a key that cannot be sent: HTTP headers hold letters without accents, digits and ASCII signs, and there "
        "is something else in it, such as a space, a typographic dash or an accent. Copy the key again, or choose another"
    )
