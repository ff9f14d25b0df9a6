"""Strict YAML that remembers where every key stands, so that an error can say file and line.

- Composed, not loaded: the nodes of ``yaml.SafeLoader`` carry their marks; scalars become values through
  the same safe loader, so no tag can build anything but plain values.
- A key given twice is an error (plain YAML silently takes the last one). Aliases are errors: a recipe
  says each value where it stands.
- ``Source.locate`` is the ``locate`` of ``scaling.schema``: values set on the command line are named
  by their option, all others by file and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scaling.config import ConfigError

Keys = tuple[str, ...]


@dataclass
class Source:
    """Plain values read from a file, with the line of every key and the options that replaced values."""

    file: Path
    data: Any
    lines: dict[Keys, int]
    overridden: set[Keys] = field(default_factory=set)

    def locate(self, path: Keys) -> str:
        """Where a person finds the value at ``path``: its option, or the nearest line that holds it."""
        parts = [path[:end] for end in range(len(path), -1, -1)]
        for part in parts:  # an option replaces all that stands below it in the file
            if part in self.overridden:
                return "--" + ".".join(part).replace("_", "-")
        for part in parts:
            if part in self.lines:
                return f"{self.file}, line {self.lines[part]} ({'.'.join(path)})"
        return f"{self.file}" + (f" ({'.'.join(path)})" if path else "")

    def blame(self, error: ConfigError, parts: Sequence[Keys] = ()) -> ConfigError:
        """The error at the line or option of the key that its message starts with, if there is one.

        Args:
            parts: paths below which the key may stand too; such a value wins over the common one.
        """
        text = re.sub(rf"^{re.escape(str(self.file))}(, line \d+ \([^)]*\))?: ", "", str(error))
        key = re.match(r"[a-z_]+(\.[a-z_]+)*", text)
        path = tuple(key[0].split(".")) if key else ()
        for end in range(len(path), 0, -1):
            common = path[:end]
            own = [(*part, *common) for part in parts] if common not in self.overridden else []
            for place in (*own, common):
                if place in self.overridden or place in self.lines:
                    return ConfigError(f"{self.locate(place).split(' (')[0]}: {text}")
        return error

    def override(self, values: Mapping[Keys, Any]) -> None:
        """Put plain values in place of the file's; nothing else changes."""
        for path, value in values.items():
            node = self.data
            for key in path[:-1]:
                if not isinstance(node, dict):
                    break
                node = node.setdefault(key, {})
            if isinstance(node, dict):  # else the file is wrong there, and reading it says so
                node[path[-1]] = value
                self.overridden.add(path)


def read_source(file: Path) -> Source:
    """Read a YAML file.

    Raises:
        ConfigError: not readable, not YAML, empty, a key twice, an alias; with file and line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not text in UTF-8") from None
    source = Source(file, None, {})
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{file}: the file is empty")
        source.data = _plain(loader, node, (), source, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else f"{file}"
        raise ConfigError(f"{where}: not valid YAML ({error.problem or error.context})") from None
    except RecursionError:
        raise ConfigError(f"{file}: brackets within brackets, too deep to be a recipe") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    return source


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: Keys, source: Source, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise ConfigError(f"{source.file}, line {line}: YAML aliases are not used in recipes")
    seen.add(id(node))
    if path:
        source.lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = getattr(key_node, "value", None)
            here = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"{source.file}, line {here}: a key must be one word")
            if key in values:
                first = source.lines[(*path, key)]
                raise ConfigError(
                    f"{source.file}, line {here}: key '{key}' was already given in line {first}"
                )
            source.lines[(*path, key)] = here
            values[key] = _plain(loader, value_node, (*path, key), source, seen)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, v, (*path, str(i)), source, seen) for i, v in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except ValueError as error:  # such as the date 2024-13-45
        raise ConfigError(f"{source.file}, line {line}: {error}") from None
    except (KeyError, AttributeError):  # how the loader meets a word that its tag has no value for
        kind = node.tag.rpartition(":")[2]
        raise ConfigError(f"{source.file}, line {line}: {node.value!r} is no {kind}") from None
