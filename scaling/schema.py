"""Frozen dataclasses to and from plain JSON values, strictly, and their content hash.

Strict means: an unknown key, a missing value or a wrong type is a ``ConfigError`` that says
which key, what was given and what was expected. A reader of YAML passes ``locate`` to add
the file and line. Fields with ``metadata={"identity": False}`` (where data lies, not what it
is) are left out of ``identity`` and so of every hash; a name there instead of False is what the field
is called in ``identity``, so that a hash outlives a change of fields. So does ``metadata={"added": True}``:
a field that came later is left out of ``identity`` while it has its default. A class whose fields do not all
count in every case has a method ``effective``: the same with those that do nothing at their defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Path = tuple[str, ...]
Locate = Callable[[Path], str]


class ConfigError(ValueError):
    """A description that cannot be run; the message is meant for the person who wrote it."""


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def here(path: Path) -> str:
    """The default ``locate``: the dotted key alone."""
    return ".".join(path) or "(top level)"


def from_dict(cls: type[T], data: Any, locate: Locate = here, path: Path = ()) -> T:
    """Build the dataclass ``cls`` from plain values.

    Args:
        cls: a (frozen) dataclass; nested dataclasses, tuples, ``X | None`` and ``Literal`` are understood.
        data: what JSON or YAML gave, a mapping.
        locate: from a key's path to where a person finds it, for messages.
        path: the path of ``data`` itself.

    Raises:
        ConfigError: unknown key (with the nearest known one), missing key, wrong type, bad value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{locate(path)}: expected a mapping of keys, got {_show(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(fields)}"
            raise ConfigError(f"{locate((*path, str(key)))}: unknown key '{key}'{hint}")
    values, hints = {}, typing.get_type_hints(cls)
    for name, field in fields.items():
        if name in data:
            values[name] = convert(hints[name], data[name], locate, (*path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{locate(path)}: missing key '{name}'")
    try:
        return cls(**values)
    except ConfigError as error:
        where = locate(path)
        raise (error if where == here(()) else ConfigError(f"{where}: {error}")) from None


def convert(hint: Any, value: Any, locate: Locate, path: Path) -> Any:
    """One value to the annotated type ``hint``; ``ConfigError`` when it is not of that type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return convert(options[0], value, locate, path)
        for option in options:
            try:
                return convert(option, value, locate, path)
            except ConfigError:
                continue
        raise ConfigError(f"{locate(path)}: expected {_name(hint)}, got {_show(value)}")
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{locate(path)}: expected {_name(hint)}, got {_show(value)}{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{locate(path)}: expected a list, got {_show(value)}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(convert(args[0], v, locate, (*path, str(i))) for i, v in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{locate(path)}: expected {len(args)} values, got {len(value)}")
        return tuple(
            convert(a, v, locate, (*path, str(i))) for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{locate(path)}: expected a mapping of keys, got {_show(value)}")
        return {str(k): convert(args[1], v, locate, (*path, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, locate, path)
    if hint is Any:
        return value
    if hint is float:
        value = _number(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{locate(path)}: expected a finite number, got {value}")
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{locate(path)}: expected {_name(hint)}, got {_show(value)}")


def _number(value: Any) -> Any:
    """Whole numbers as floats, and text that is one: YAML 1.1 reads "2e-3" as text (it wants "2.0e-3")."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def to_dict(obj: Any) -> dict[str, Any]:
    """A dataclass as JSON values: tuples become lists, nothing is left out."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(obj)))
    return result


def identity(obj: Any) -> Any:
    """As ``to_dict``, without the fields that only say where something lies."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = obj.effective() if hasattr(obj, "effective") else obj
        names = {
            f.name: f.metadata.get("identity", f.name)
            for f in dataclasses.fields(obj)
            if not (f.metadata.get("added") and getattr(obj, f.name) == f.default)
        }
        return {shown: identity(getattr(obj, name)) for name, shown in names.items() if shown}
    if isinstance(obj, tuple | list):
        return [identity(v) for v in obj]
    return obj


def content_hash(obj: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``identity(obj)``."""
    text = json.dumps(identity(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _name(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_name(get_args(hint)[0])}"
    return getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
