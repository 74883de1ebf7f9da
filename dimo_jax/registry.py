"""Look a name up in a table of factories, and name the known ones when it is not there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from dimo_jax.errors import UserError


def lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """`table[name]`, or a UserError that lists the names there are. `kind` says what the table holds."""
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}: known are {', '.join(sorted(table))}")
    return table[name]


def make(table: Mapping[str, Callable], entry: Mapping[str, Any] | str, kind: str) -> Any:
    """Call the factory an entry names: `"arccos"`, or `{"name": "jeffreys", "beta": -0.2}` with its arguments.

    Raises:
      UserError: unknown name, or arguments the factory does not take.
    """
    arguments = {"name": entry} if isinstance(entry, str) else dict(entry)
    if "name" not in arguments:
        raise UserError(f"a {kind} is given by a name, or a dict with the key 'name'; given {arguments}")
    name = arguments.pop("name")
    factory = lookup(table, name, kind)
    try:
        return factory(**arguments)
    except TypeError as error:
        raise UserError(f"{kind} {name!r} does not take the arguments {arguments}: {error}") from error


def build(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    """`cls(**fields)` for a frozen dataclass; a key it does not have dies with its own name and the known ones.

    A field whose type is itself a dataclass is built from its mapping. `where`: the place in the config, for the error.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UserError(
            f"unknown config key {', '.join(f'{where}.{k}' for k in unknown)}: known are {', '.join(known)}"
        )
    missing = [
        name for name, f in known.items()
        if name not in fields and f.default is f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise UserError(f"the config lacks {', '.join(f'{where}.{name}' for name in missing)}")
    types = get_type_hints(cls)
    values = {
        name: build(types[name], value, f"{where}.{name}") if dataclasses.is_dataclass(types[name]) else value
        for name, value in fields.items()
    }
    return cls(**values)
