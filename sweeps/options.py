"""Command-line options from dataclasses: ``--train.lr 3e-4`` sets one value of a recipe.

- Every leaf of ``Recipe`` is an option, and so is every field of a command's own dataclass. Values go
  through ``scaling.schema.convert`` like those of the file, so both speak with one voice.
- Not tyro: it reads a finished instance, so an option could not repair or complete a recipe before it is
  checked; its errors are boxes of up to fifteen lines where a person needs one; and it adds 0.3 s to a plan
  that should appear at once. This module is its part that is needed here.
- An option changes what it names and nothing else: ``--train.epochs 3`` on a recipe with ``train.steps``
  is an error that names both, and ``--train.steps none --train.epochs 3`` is the answer.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from scaling.config import ConfigError
from sweeps.source import Keys


@dataclass(frozen=True)
class Option:
    """One settable value."""

    path: Keys
    hint: Any
    doc: str

    @property
    def flag(self) -> str:
        """As it is written: ``--tokenizer-train.steps``."""
        return flag_of(self.path)

    @property
    def many(self) -> bool:
        """Whether it takes a list of values."""
        return any(get_origin(a) is tuple for a in _alternatives(self.hint))

    @property
    def metavar(self) -> str:
        """What it takes, for the help."""
        names = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", type(None): "none"}

        def word(hint: Any) -> str:
            if get_origin(hint) is Literal:
                return "|".join(str(a) for a in get_args(hint))
            return f"{word(get_args(hint)[0])} ..." if get_origin(hint) is tuple else names[hint]

        return "|".join(word(hint) for hint in _alternatives(self.hint))


def flag_of(path: Keys) -> str:
    """The option of a value, or of the list that it is in; a field named after a word of Python's ends with
    an underscore, ``class_``."""
    return "--" + ".".join(key.removesuffix("_") for key in path if not key.isdigit()).replace("_", "-")


def options_of(cls: type, path: Keys = ()) -> list[Option]:
    """The options of a dataclass, nested ones included; lists of dataclasses and mappings are left to the
    file."""
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    found: list[Option] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += options_of(typing.cast(type, hint), (*path, field.name))
        elif get_origin(hint) is not dict and not any(dataclasses.is_dataclass(a) for a in get_args(hint)):
            found.append(Option((*path, field.name), hint, docs.get(field.name, "")))
    return found


def parse(arguments: Sequence[str], options: Sequence[Option]) -> dict[Keys, Any]:
    """Plain values by path; types are checked later, by ``from_dict``.

    Raises:
        ConfigError: an unknown option (with the nearest), one given twice, a missing or a surplus value.
    """
    known = {option.flag: option for option in options}
    values: dict[Keys, Any] = {}
    for flag, words in _groups(arguments):
        option = known.get(flag.replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise ConfigError(f"unknown option {flag}; {hint}")
        if option.path in values:
            raise ConfigError(f"{flag} is given twice")
        if option.many:
            parsed = [_plain(option.hint, w) for word in words for w in word.split(",") if w]
            # Of others no values are a value: --evaluation.snapshots alone asks for none.
            if not parsed and type(None) in _alternatives(option.hint):
                raise ConfigError(f"{flag} takes values ({option.metavar})")
            values[option.path] = None if parsed == [None] else parsed
        elif not words and bool in _alternatives(option.hint):
            values[option.path] = True
        elif len(words) == 1:
            values[option.path] = _plain(option.hint, words[0])
        else:
            surplus = (
                f"one value ({option.metavar}), got {' '.join(words)}"
                if words
                else f"a value ({option.metavar})"
            )
            raise ConfigError(f"{flag} takes {surplus}")
    return values


def help_text(options: Sequence[Option], current: Any, width: int) -> str:
    """One entry per option with the present value from the dataclass ``current``, grouped by section.

    Args:
        width: columns of the terminal.
    """
    lines: list[str] = []
    section: Keys | None = None
    for option in sorted(options, key=lambda o: (len(o.path) > 1, o.path[:-1] if len(o.path) > 1 else ())):
        if option.path[:-1] != section:
            section = option.path[:-1]
            lines += ["", f"{'.'.join(section)}:" if section else "general:"]
        value = current
        for key in option.path:
            value = getattr(value, key)
        entry = f"  {option.flag} {option.metavar}   [{_shown(value)}]"
        for text, first in ((entry, ""), (option.doc, " " * 6)):
            lines += textwrap.wrap(  # options and file names are not cut at their hyphens
                text, width, initial_indent=first, subsequent_indent=" " * 6,
                break_on_hyphens=False, break_long_words=False, replace_whitespace=False,
            )  # fmt: skip
    return "\n".join(lines)


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    flag, words = "", list[str]()
    for argument in arguments:
        if argument.startswith("--"):
            if flag:
                yield flag, words
            flag, equals, value = argument.partition("=")
            words = [value] if equals else []
        elif not flag:
            raise ConfigError(f"'{argument}' was not expected here; options start with --")
        else:
            words.append(argument)
    if flag:
        yield flag, words


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _plain(hint: Any, word: str) -> Any:
    kinds: set[Any] = set()
    for option in _alternatives(hint):
        kinds |= set(get_args(option)) if get_origin(option) is tuple else {option}
    if type(None) in kinds and word.lower() in ("none", "null"):
        return None
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    return word


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "true" if value is True else "false" if value is False else "none" if value is None else str(value)


def _field_docs(cls: type) -> dict[str, str]:
    """The strings that stand below the fields in the source, those of inherited fields too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs
