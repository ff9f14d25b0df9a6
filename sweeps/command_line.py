"""The command line: one word for the command, one for what it works on, options; and its help.

    python run_sweep.py COMMAND RECIPE [--key value ...]

- What a command does is the caller's; this module finds command, recipe or sweep and options in the words.
- Help is made from the same table of commands, docstrings and fields, and is as wide as the terminal.
"""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from scaling.config import ConfigError, from_dict, here
from sweeps.options import Option, flag_of, help_text, options_of, parse
from sweeps.recipe import Recipe, load_recipe, shipped_recipes
from sweeps.source import Keys
from sweeps.where import known_sweep, refuse_sweep

NO_TERMINAL = 100
"""Columns of the help where there is no terminal to ask."""
LEAST_WIDTH = 40
WORDS = {"recipe": "RECIPE", "sweep": "SWEEP", "runs": "WHERE", "model": "WHERE", "table": "TABLE"}
"""What the first word is called in the help, by what it names."""


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    do: Callable[[Any, Any], int]
    """From what the first word names and the options to the exit code; its docstring is its help."""
    options: Callable[[], type]
    """The dataclass of its own options; a function, since not all of them are cheap to import."""
    takes: Literal["recipe", "sweep", "runs", "table", "model"]
    """What its first word names: a recipe whose values can be set, a sweep as it is on the disk (handed over
    as its folder), finished runs (a sweep's or one), a file with a table, or a model (a run's folder, a sweep
    with a depth, or a checkpoint)."""
    further: tuple[str, ...] = ()
    """Words after the first; then all are given together."""


def dispatch(
    commands: Mapping[str, Command], script: str, about: str, arguments: Sequence[str], default: Sequence[str]
) -> int:
    """Find command, recipe and options in the command line, and do it; the exit code.

    Args:
        script: how the program is called, for its help.
        about: the beginning of the help.
        default: the words where there is no command.

    Raises:
        ConfigError: a word or option that is not known or does not fit; whatever the command raises.
    """
    wants_help = any(a in ("-h", "--help") for a in arguments)
    words = [a for a in arguments if a not in ("-h", "--help")]
    if wants_help and not words:
        print(overview(commands, script, about, help_width()))
        return 0
    if not words or words[0].startswith("--"):
        words = [*default, *words]
    name, *rest = words
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(commands)}"
        raise ConfigError(f"unknown command '{name}'; {hint}")
    command = commands[name]
    first = rest[0] if rest and not rest[0].startswith("--") else None
    if wants_help:
        print(command_help(name, command, first, script, help_width()))
        return 0
    if first is None:
        raise ConfigError(f"'{name}' needs {meaning(command.takes)}")
    words = rest[: 1 + len(command.further)]
    for word, given in zip_longest(command.further, words[1:]):
        if given is None or given.startswith("--"):
            raise ConfigError(f"'{name}' needs {word} after {words[0]}")
    return _do(name, command, words, rest[len(words) :])


def _do(name: str, command: Command, words: Sequence[str], arguments: Sequence[str]) -> int:
    first, own = words[0], options_of(command.options())
    shared = options_of(Recipe) if command.takes == "recipe" else []
    if command.takes == "sweep":
        _refuse_recipe_values(name, arguments, own)
    values = parse(arguments, [*own, *shared])
    mine = {option.path for option in own}
    chosen = _nested({path: value for path, value in values.items() if path in mine})
    options: Any = from_dict(command.options(), chosen, lambda path: flag_of(path) if path else here(path))
    if command.takes == "sweep":
        return command.do(known_sweep(first, options.root, options.name), options)
    if command.takes == "recipe":
        refuse_sweep(name, first, options.root)
        recipe = load_recipe(first, {path: value for path, value in values.items() if path not in mine})
        return command.do(recipe, options)
    return command.do(tuple(words) if command.further else first, options)


def help_width() -> int:
    """Columns for the help: the terminal's, whatever it is."""
    return max(LEAST_WIDTH, shutil.get_terminal_size((NO_TERMINAL, 24)).columns)


def meaning(takes: str) -> str:
    """What a command's first word may be."""
    return {
        "recipe": f"a recipe: a file, or one of {', '.join(shipped_recipes())}",
        "sweep": "a sweep: its name, its folder or its recipe",
        "runs": "runs: a recipe, a sweep's name or folder, or a run's folder",
        "model": "a model: a run's folder, a sweep or its recipe with --depth, or a checkpoint",
        "table": "a table: a file with one row per run or evaluation",
    }[takes]


def overview(commands: Mapping[str, Command], script: str, about: str, width: int) -> str:
    """Every command in a line or two, and what their first words mean.

    Args:
        about: what the program is, then further paragraphs for the end.
    """
    first, *paragraphs = about.strip().split("\n\n")
    calls = {name: " ".join([name, WORDS[c.takes], *c.further]) for name, c in commands.items()}
    column = 4 + max(map(len, calls.values()))
    lines = [_filled(first, width), "", f"  {script} COMMAND WORD [--key value ...]", ""]
    for name, command in commands.items():
        lines.append(_filled(_doc(command), width, f"  {calls[name]}".ljust(column), " " * column))
    lines.append("")
    for takes, word in WORDS.items():
        users = ", ".join(name for name, command in commands.items() if command.takes == takes)
        lines.append(_filled(f"{word} of {users} is {meaning(takes)}", width, "", "  "))
    return "\n".join([*lines, *(line for text in paragraphs for line in ("", _filled(text, width)))])


def command_help(name: str, command: Command, first: str | None, script: str, width: int) -> str:
    """A command's own options first; the recipe's values where it takes them and a recipe is named."""
    own = options_of(command.options())
    word = first or WORDS[command.takes]
    text = f"{script} {name} {' '.join([word, *command.further])} [--key value ...]\n\n"
    text += f"{_filled(f'{name} - {_doc(command)}', width)}\n{help_text(own, command.options()(), width)}"
    if command.takes == "recipe" and first is not None:
        recipe = load_recipe(first)
        text += f"\n\nValues of the recipe\n{help_text(options_of(Recipe), recipe, width)}"
        end = (
            "by_family and by_depth (values of single families and depths) are set in the recipe; an option "
            "wins for all of them. So are grid, zip and lr_rule (docs/designs.md)."
        )
    elif command.takes == "recipe":
        end = f"Any value of the recipe too: '{script} {name} RECIPE --help' lists them."
    elif command.takes == "sweep":
        end = (
            f"{WORDS['sweep']} is {meaning('sweep')}. It is read as it is on the disk: values of the recipe "
            f"cannot be set here ('{script} plan RECIPE --help' lists them)."
        )
    else:
        end = f"{WORDS[command.takes]} is {meaning(command.takes)}."
    return f"{text}\n\n{_filled(end, width)}"


def _doc(command: Command) -> str:
    return " ".join((command.do.__doc__ or "").split())


def _filled(text: str, width: int, first: str = "", later: str = "") -> str:
    """A paragraph; options and file names are not cut at their hyphens."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _nested(values: Mapping[Keys, Any]) -> dict[str, Any]:
    """Values by path as the mapping that ``from_dict`` reads."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        inner = result
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return result


def _refuse_recipe_values(name: str, arguments: Sequence[str], own: Sequence[Option]) -> None:
    known = {option.flag for option in own}
    recipe = {option.flag for option in options_of(Recipe)}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in recipe - known:
            raise ConfigError(
                f"{flag} is a value of the recipe, which '{name}' does not use: it reads the sweep as it is "
                f"on the disk; its own options: {' '.join(sorted(known))}"
            )
