"""Reading a recipe: TOML of at most 30 lines, dotted overrides behind it, checked before any model is loaded."""

import copy
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from potstill import registry
from potstill.config import Config
from potstill.errors import ConfigError, unknown
from potstill.teachers import settings


def packaged() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def read(recipe: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> tuple[Config, str]:
    """A recipe and its text.

    Args:
        recipe: A TOML file, a JSON file such as a run's resolved.json, or the name of a recipe of the package.
        overrides: `key=value`; they win over the variant.
        variant: An entry of the recipe's [variants], laid over the rest. Unset: the recipe as it stands.

    Raises:
        ConfigError: It cannot be read, or is no recipe.
    """
    raw, variants, text = tables(recipe)
    notes = list(overrides)
    if variant is not None:
        if variant not in variants:
            raise ConfigError(
                f"{recipe} has no [variants], so there is no variant {variant!r}. Leave --variant out, or add the table"
                if not variants
                else f"{recipe}: {unknown('variant', variant, variants)}"
            )
        raw = merged(raw, variants[variant])
        notes.insert(0, f"variant {variant}")
    for override in overrides:
        _apply(raw, override)
    if variant is not None:
        raw = without_unused(raw)
    shown = "".join(f"# {note}\n" for note in notes)
    return parse(raw), (f"{text}\n# chosen on the command line:\n{shown}" if notes else text)


def without_unused(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's tables, without a [teacher] or [reference] that its method does not ask: those are for the others."""
    method = parse(dict(raw)).method
    unused = {"teacher": getattr(method, "teacherless", False), "reference": getattr(method, "refers_to", "") != "base"}
    return {key: value for key, value in raw.items() if not unused.get(key)}


def tables(recipe: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """A recipe's tables as they stand, its variants by name, and its text in TOML. Raises ConfigError."""
    path = Path(recipe)
    if not path.is_file():
        known = packaged()
        if str(recipe) not in known:
            raise ConfigError(
                f"{unknown('recipe', str(recipe), known)}. Give one of these names, or the path of a TOML file"
            )
        path = known[str(recipe)]
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a recipe that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}. A recipe is a text file in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: {error}. See `potstill check` on one of: {', '.join(packaged())}"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Give a whole file, such as a run's resolved.json") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no recipe: it holds no tables. Give a TOML file or a run's resolved.json")
    if path.suffix == ".json":
        text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flat(raw).items())
    variants = raw.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise ConfigError(
            f'{path}: [variants] should hold a table for each name, such as sft = {{method.name = "sft"}}'
        )
    return raw, variants, text


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, table by table; a method of another name takes nothing from the base's."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        there = out.get(key)
        other = key == "method" and "name" in value and isinstance(there, dict) and there.get("name") != value["name"]
        nested = isinstance(there, dict) and isinstance(value, Mapping) and not other
        out[key] = merged(there or {}, value) if nested else copy.deepcopy(value)
    return out


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and their values; those that are None are left out, as TOML has no word for them."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = value
    return out


def parse(raw: dict[str, Any]) -> Config:
    """A recipe from plain tables. Raises ConfigError that names every field at fault."""
    raw = dict(raw)
    problems: list[str] = []
    for table, key, find in (("method", "name", registry.method_class), ("task", "kind", registry.task_class)):
        given = raw.get(table)
        if not isinstance(given, dict) or key not in given:
            problems.append(f"[{table}] needs {key} = ...")
            continue
        if not isinstance(given[key], str):
            problems.append(f"{table}.{key} = {given[key]!r}: should be a name, in quotes")
            continue
        cls = find(given[key])
        values = {k: v for k, v in given.items() if not (k == key and ".py:" in str(v))}
        try:
            raw[table] = cls.model_validate(values)
        except ValidationError as error:
            problems += _explain(error, cls, table)
            raw[table] = cls.model_construct()
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [
            p for p in _explain(error, Config, "") if not any(p.startswith(f"{t}:") for t in ("task", "method"))
        ]
        config = None
    if problems or config is None:
        raise ConfigError("the recipe cannot be used:\n" + "\n".join(f"  - {p}" for p in dict.fromkeys(problems)))
    return config


def _apply(raw: dict[str, Any], override: str) -> None:
    """`learner.lr=1e-4`: the value is TOML, or a string where it is not."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is no override. Write key=value, such as learner.lr=1e-4 or method.beta=0.5")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *tables, last = key.split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{override!r}: {table} is a value, not a table, so nothing can be set inside it")
    raw[last] = parsed


def _explain(error: ValidationError, cls: type[BaseModel], prefix: str) -> Iterable[str]:
    for e in error.errors():
        table, *inside = e["loc"] or ("",)
        kinded = cls is Config and table == "teacher"  # pydantic puts the kind of teacher between table and field
        loc = (table, *inside[kinded:])
        where = ".".join(str(part) for part in (prefix, *loc) if part != "")
        if e["type"] == "union_tag_invalid":
            kinds = [kind.strip("' ") for kind in e["ctx"]["expected_tags"].split(",")]
            yield f"{where}.kind: {unknown('kind', str(e['ctx']['tag']), kinds)}"
        elif e["type"] == settings.SECRET:
            yield f"{where}: {e['msg']}"
        elif e["type"] == "extra_forbidden":
            fields = _fields_at(cls, e["loc"][:-1])
            yield f"{where}: {unknown('field', str(e['loc'][-1]), fields)}"
        elif e["type"] == "missing":
            yield f"{where}: missing, and it has no default"
        else:
            message = e["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            about_table = isinstance(e["input"], dict) and e["type"] == "value_error"  # no single value is at fault
            yield ": ".join(filter(None, (where if about_table else f"{where} = {e['input']!r}", message)))


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    options: list[type[BaseModel]] = [cls]
    for part in map(str, loc):
        if len(options) > 1:  # pydantic puts the tag of a tagged union into the location
            options = [o for o in options if any(part == f.default for f in o.model_fields.values())]
        else:
            options = list(_models(options[0].model_fields[part].annotation))
    return [field.alias or name for name, field in options[0].model_fields.items()]


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    """The tables in a type, however deep inside a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _models(inside)


def parse_part(cls: Any, raw: dict[str, Any], overrides: Sequence[str], table: str) -> Any:
    """One table of a recipe by itself. Raises ConfigError."""
    raw = dict(raw)
    for override in overrides:
        _apply(raw, override)
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  - {p}" for p in _explain(error, cls, table))
        raise ConfigError(f"[{table}] cannot be used:\n{problems}") from None
