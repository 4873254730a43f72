"""What teachers cost: a table in TOML that the user may replace."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from potstill.errors import ConfigError

BUNDLED = Path(__file__).parent / "prices.toml"
MILLION = 1_000_000


class Price(BaseModel, frozen=True, extra="forbid"):
    """Money per million tokens."""

    read: float = Field(ge=0)
    written: float = Field(ge=0)
    cached: float | None = Field(None, ge=0)
    """Unset: as `read`."""
    stored: float | None = Field(None, ge=0)
    """Unset: as `read`."""

    def cost(self, read: int, cached: int, stored: int, written: int) -> float:
        """Of one request, in money. `cached` and `stored` are parts of `read`."""
        plain = read - cached - stored
        at_cache = self.read if self.cached is None else self.cached
        at_store = self.read if self.stored is None else self.stored
        return (plain * self.read + cached * at_cache + stored * at_store + written * self.written) / MILLION


@dataclass(frozen=True)
class Prices:
    """Price tables, the first one first."""

    tables: tuple[Mapping[str, Mapping[str, Price]], ...]

    def of(self, provider: str, model: str) -> Price | None:
        """The price of a model: of the longest listed name that it begins with. None if there is none."""
        for table in self.tables:
            listed = table.get(provider, {})
            if near := [name for name in listed if model.startswith(name)]:
                return listed[max(near, key=len)]
        return None


def read_prices(path: Path | None = None) -> Prices:
    """The user's table, if there is one, before the one that comes with the package. Raises ConfigError."""
    return Prices(tuple(_table(p) for p in (path, BUNDLED) if p is not None))


def _table(path: Path) -> Mapping[str, Mapping[str, Price]]:
    try:
        raw = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, dict[str, Price]]).validate_python(raw)
    except OSError as error:
        raise ConfigError(f"the price table {path} cannot be read: {error.strerror}. Give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the price table {path} is not TOML: {error}. See {BUNDLED}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the price table {path} cannot be used: {'.'.join(map(str, first['loc']))}: {first['msg']}. Write "
            '[provider] and "model" = { read = 3.0, written = 15.0 }, money per million tokens'
        ) from None
