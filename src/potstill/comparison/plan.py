"""What is to be compared: variants of one recipe, the seeds, one budget. Needs no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from potstill import config, recipes, registry
from potstill.errors import ConfigError, unknown

Tables = dict[str, Any]
BUDGETS = ("steps", "rollout_tokens", "teacher_tokens", "cpu_seconds")
SHARED = {"name", "seed", "steps", "budget", "student", "task", "eval"}
"""Tables in which variants may not differ, or it would be no comparison; `student.lora` may."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A comparison as asked for. Its variants are whole recipes without name and seed, by label."""

    text: str
    """Of the recipe."""
    overrides: tuple[str, ...]
    budget: str | None
    """`steps=400`; None: the recipe's own."""
    base: Tables
    """The recipe without its variants, overridden."""
    variants: dict[str, Tables]
    seeds: tuple[int, ...]

    @property
    def labels(self) -> list[str]:
        """Of the variants, in the order given."""
        return list(self.variants)

    def record(self) -> Tables:
        """As plan.json holds it."""
        return {
            "recipe": self.text,
            "overrides": list(self.overrides),
            "budget": self.budget,
            "base": self.base,
            "variants": self.variants,
            "seeds": list(self.seeds),
        }

    def joined(self, old: Mapping[str, Any], folder: Path) -> Tables:
        """The record of this plan and an older one together. Raises ConfigError if they contradict each other."""
        new = json.loads(json.dumps(self.record()))
        differ = [f"{d}" for d in differences(old["base"], new["base"])]
        for label in old["variants"].keys() & new["variants"].keys():
            differ += [f"{label}: {d}" for d in differences(old["variants"][label], new["variants"][label])]
        if differ:
            raise ConfigError(
                f"{folder} holds another comparison, whose runs cannot stand beside new ones: {'; '.join(differ[:6])}. "
                "Repeat its command as it was (more methods or seeds are fine), or give another folder with --out"
            )
        variants = old["variants"] | new["variants"]
        return new | {"variants": variants, "seeds": sorted({*old["seeds"], *new["seeds"]})}

    def changes(self, label: str) -> list[tuple[str, Any, Any]]:
        """(field, in the recipe, in the variant) wherever they differ; None where it is not set."""
        a, b = recipes.flat(self.base), recipes.flat(self.variants[label])
        return [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def make(
    recipe: str | Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], budget: str | None
) -> Plan:
    """Read the recipe and lay out what to run. Raises ConfigError."""
    base, variants, text = recipes.tables(recipe)
    limit = None if budget is None else parse_budget(budget)
    for override in overrides:
        _check_override(override, limit is not None)
        recipes._apply(base, override)
    entries = list(methods) or list(variants)
    if not entries:
        raise ConfigError(
            f"{recipe} has no [variants], so there is nothing to compare. Say what: --methods opd,sft, or add the table"
        )
    if twice := sorted({e for e in entries if entries.count(e) > 1}):
        raise ConfigError(f"--methods names {', '.join(twice)} twice. Leave one out; more runs of it are more --seeds")
    out = {entry: _variant(entry, base, variants, overrides) for entry in entries}
    _check_shared(out)
    _check_folders(entries)
    if limit:
        for table in (base, *out.values()):
            _limit(table, *limit)
    return Plan(text, tuple(overrides), budget, base, out, tuple(seeds))


def split_methods(text: str) -> list[str]:
    """`a,b:x=[1,2]` -> a, b:x=[1,2]: split at commas outside brackets."""
    return [entry.strip() for entry in re.split(r",(?![^\[{]*[\]}])", text) if entry.strip()]


def parse_seeds(text: str) -> list[int]:
    """`0-4`, `0,2,5` or `0-2,7`. Raises ConfigError."""
    out: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"--seeds {text!r} is no list of seeds. Write 0-4, or 0,2,5")
        out += range(int(found[1]), int(found[2] or found[1]) + 1)
    return out


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError if there are none, or one twice."""
    if not seeds:
        raise ConfigError("there are no seeds, so there is nothing to run. Give at least one, such as --seeds 0-4")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            f"seeds {', '.join(map(str, seeds))}: each must be 0 or more, and there once; the same seed is the same run"
        )


def parse_budget(text: str) -> tuple[str, int | float]:
    """`steps=400` -> ("steps", 400). Raises ConfigError."""
    name, sign, value = text.partition("=")
    if "," in value or value.count("="):
        raise ConfigError(f"--budget {text!r} names two budgets, and one of them would decide. Give exactly one")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    whole = name == "cpu_seconds" or number.is_integer()
    if not sign or name not in BUDGETS or not 0 < number < float("inf") or not whole:
        raise ConfigError(f"--budget {text!r} is none. Write one of {', '.join(f'{b}=N' for b in BUDGETS)}, with N > 0")
    return name, number if name == "cpu_seconds" else int(number)


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", label).strip("_")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """`learner.lr (0.001 there, 0.002 now)` for every field in which two recipes differ."""
    x, y = recipes.flat(a), recipes.flat(b)

    def shown(table: Mapping[str, Any], key: str) -> str:
        return repr(table[key]) if key in table else "not set"

    return [f"{k} ({shown(x, k)} there, {shown(y, k)} now)" for k in dict.fromkeys([*x, *y]) if x.get(k) != y.get(k)]


def _variant(entry: str, base: Tables, variants: Mapping[str, Tables], overrides: Sequence[str]) -> Tables:
    """The recipe behind an entry of --methods: NAME, or NAME:key=value:key=value."""
    name, *fields = re.split(r":(?=[A-Za-z_][\w.]*=)", entry)
    known = {**variants, **registry.methods()}
    if name in variants:
        out = recipes.merged(base, variants[name])
        for override in overrides:  # what is said on the command line wins over the recipe's own variant
            recipes._apply(out, override)
    elif name in known or ".py:" in name:
        out = recipes.merged(base, {"method": {"name": name}})
    else:
        raise ConfigError(f"--methods: {unknown('variant or method', name, known)}. Fields follow as NAME:key=value")
    for field in fields:
        recipes._apply(out, field if _is_table(field) else f"method.{field}")
    return out


def _is_table(field: str) -> bool:
    """Whether `learner.lr=1` is meant as written; `gate=random` is a field of the method."""
    first, dot, _ = field.partition("=")[0].partition(".")
    return bool(dot) and first in _tables()


def _tables() -> set[str]:
    """The names of the tables of a recipe."""
    return {name for name, field in config.Config.model_fields.items() if _holds_table(field.annotation)}


def _holds_table(annotation: Any) -> bool:
    """Whether a type is a table or a choice that has one, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_table(part) for part in get_args(annotation))


def _check_override(override: str, budgeted: bool) -> None:
    key = override.partition("=")[0]
    if key in ("name", "seed"):
        raise ConfigError(f"{override}: every run of a comparison has its own {key}. Use --seeds and --out")
    if key in ("method", "method.name"):
        raise ConfigError(f"{override} would make every variant the same method. Say what to compare with --methods")
    if budgeted and key.partition(".")[0] in ("steps", "budget"):
        raise ConfigError(f"{override} and --budget are two budgets, and one of them would decide. Leave one out")


def _check_shared(variants: Mapping[str, Tables]) -> None:
    first, *others = variants
    for label in others:
        a, b = recipes.flat(variants[first]), recipes.flat(variants[label])
        for key in dict.fromkeys([*a, *b]):
            shared = key.partition(".")[0] in SHARED or key == "rollouts.max_tokens"
            if shared and not key.startswith("student.lora") and a.get(key) != b.get(key):
                raise ConfigError(
                    f"{label} and {first} differ in {key} ({b.get(key, 'not set')!r}, {a.get(key, 'not set')!r}), but "
                    "variants must share the start, the questions, the longest answer and the budget, or their scores "
                    f"say nothing about the methods. Set it for all: {key}=... behind the recipe"
                )


def _check_folders(labels: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        name = folder_name(label)
        if name in seen:
            raise ConfigError(
                f"{seen[name]!r} and {label!r} would share the folder {name}. Give one of them a name in [variants]"
            )
        seen[name] = label


def _limit(table: Tables, name: str, value: int | float) -> None:
    """Give a recipe this budget and no other."""
    table.pop("steps", None)
    table.pop("budget", None)
    table |= {"steps": value} if name == "steps" else {"budget": {name: value}}
