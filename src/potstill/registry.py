"""Names to classes, without importing anything before it is used.

A third-party method is an entry point in the group `potstill.methods`, or `path/to/file.py:Class` as method.name.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from potstill.errors import ConfigError, unknown
from potstill.tasks import TASKS

METHODS = {
    "sft": "potstill.methods.sft:SFT",
    "opd": "potstill.methods.opd:OPD",
    "omniopd": "potstill.methods.omniopd:OmniOPD",
    "dagger": "potstill.methods.dagger:Dagger",
    "sampled_kl": "potstill.methods.sampled_kl:SampledKL",
    "sgopd": "potstill.methods.sgopd:SGOPD",
    "grpo": "potstill.methods.grpo:GRPO",
    "mix": "potstill.methods.mix:Mix",
    "exopd": "potstill.methods.exopd:ExOPD",
    "opdvr": "potstill.methods.opdvr:OPDVR",
    "grpd": "potstill.methods.grpd:GRPD",
    "rlsd": "potstill.methods.rlsd:RLSD",
    "r2opd": "potstill.methods.r2opd:R2OPD",
    "poweropd": "potstill.methods.poweropd:PowerOPD",
    "reopold": "potstill.methods.reopold:REOPOLD",
}


def methods() -> dict[str, str]:
    """Every known method: its name and "module:Class"."""
    return METHODS | {e.name: e.value for e in entry_points(group="potstill.methods")}


def method_class(name: str) -> Any:
    """A method's class. Raises ConfigError for an unknown name."""
    if ".py:" in name:
        return _from_file(name)
    return _find("method", name, methods())


def task_class(kind: str) -> Any:
    """A task's class. Raises ConfigError for an unknown kind."""
    return _find("task", kind, TASKS)


def _find(what: str, name: str, known: dict[str, str]) -> Any:
    if name not in known:
        raise ConfigError(unknown(what, name, known))
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _from_file(name: str) -> Any:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}, so method {name!r} cannot be loaded. Give path/to/file.py:Class")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ConfigError(f"in {path}: {unknown('class', attribute, [n for n in vars(module) if n[0].isupper()])}")
    return getattr(module, attribute)
