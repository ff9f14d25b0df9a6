"""varscale's command line: plan, train, watch and report a depth sweep.

    python run_sweep.py                          the quickstart, from photographs to report
    python run_sweep.py COMMAND RECIPE [--key value ...]

COMMAND is one of
    plan       print what the sweep costs; runs nothing
    tokenize   train the tokenizer and cache the tokens
    run        do everything that is missing, then write the report
    status     print where every job stands
    report     write the report of what is there
    sample     draw pictures from a finished run

RECIPE is a file or the name of a shipped recipe: quickstart, cifar10, cifar10-cpu, imagenet256.
Any value of the recipe can be set: --train.lr 3e-4 --depths 2 4 6 --data.path X;
'python run_sweep.py plan RECIPE --help' lists them all with their values.

Exit codes: 0 done; 1 a run failed; 2 bad input, told in one line; 130 interrupted.

This file only parses and dispatches. Torch is imported by nothing here but ``sample``.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, DataConfig, from_dict
from scaling.process import one_line
from scaling.records import RecordsError
from sweeps.options import help_text, options_of, parse
from sweeps.recipe import Recipe, load_recipe

REFUSED = 2
USER_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""System errors that a person causes and removes; any other is a fault of ours and shows its traceback."""


@dataclass(frozen=True)
class Options:
    """Options of ``tokenize`` and of every command."""

    root: str = "runs"
    """The folder of all sweeps, tokenizers and token caches."""


@dataclass(frozen=True)
class TableOptions(Options):
    """Options of ``plan`` and ``status``."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of ``run`` and ``report``."""

    open: bool = False
    """Open the report in a browser."""


@dataclass(frozen=True)
class SampleOptions(Options):
    """Options of ``sample``."""

    depth: int | None = None
    """Which run of the sweep; needed."""
    classes: tuple[int, ...] | None = None
    """Classes to draw, in turn; all in turn by default."""
    count: int = 16
    """Number of pictures."""
    cfg: float = 1.5
    """Classifier-free guidance."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: float = 0.0
    """Draw from the most likely tokens with this probability together; 0 from all."""
    seed: int = 0
    out: str | None = None
    """The folder of the pictures; by default samples-<settings> in the run's folder."""


def plan(recipe: Recipe, options: TableOptions) -> int:
    """Print the plan."""
    from sweeps import commands

    return commands.show_plan(commands.plan(recipe, Path(options.root), _resolve), options.json)


def tokenize(recipe: Recipe, options: Options) -> int:
    """Train the tokenizer and cache the tokens."""
    from sweeps import commands

    made = commands.plan(recipe, Path(options.root), _resolve)
    return commands.launch(made, made.jobs[:2], _check_data).exit_code


def run(recipe: Recipe, options: ReportOptions) -> int:
    """Do what is missing and write the report."""
    from sweeps import commands

    made = commands.plan(recipe, Path(options.root), _resolve)
    result = commands.launch(made, made.jobs, _check_data)
    if not result.interrupted and commands.runs_done(result):
        _report(made.folders.sweep, options.open)
    return result.exit_code


def status(recipe: Recipe, options: TableOptions) -> int:
    """Print the state of every job."""
    from sweeps.commands import show_status

    return show_status(Path(options.root) / recipe.name, options.json)


def report(recipe: Recipe, options: ReportOptions) -> int:
    """Write the report."""
    _report(Path(options.root) / recipe.name, options.open)
    return 0


def sample(recipe: Recipe, options: SampleOptions) -> int:
    """Draw pictures."""
    from sweeps.commands import finished_run

    if options.depth is None:
        raise ConfigError("sample needs --depth, the depth of a finished run")
    if options.count < 1:
        raise ConfigError(f"--count must be at least 1, got {options.count}")
    folder, tokenizer = finished_run(Path(options.root) / recipe.name, options.depth)
    settings = f"cfg{options.cfg:g}-k{options.top_k}-p{options.top_p:g}-seed{options.seed}"
    out = Path(options.out) if options.out else folder.path / f"samples-{settings}"

    from scaling.generation import sample_run

    grid = sample_run(
        run_folder=folder.path,
        tokenizer_folder=tokenizer,
        classes=options.classes,
        count=options.count,
        seed=options.seed,
        cfg=options.cfg,
        top_k=options.top_k,
        top_p=options.top_p,
        out=out,
    )
    print(grid)
    return 0


COMMANDS: dict[str, tuple[type[Options], Callable[[Recipe, Any], int]]] = {
    "plan": (TableOptions, plan),
    "tokenize": (Options, tokenize),
    "run": (ReportOptions, run),
    "status": (TableOptions, status),
    "report": (ReportOptions, report),
    "sample": (SampleOptions, sample),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        return dispatch(sys.argv[1:] if arguments is None else arguments)
    except (ConfigError, RecordsError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


def dispatch(arguments: list[str]) -> int:
    """Find command, recipe and options in the command line, and do it."""
    wants_help = any(a in ("-h", "--help") for a in arguments)
    words = [a for a in arguments if a not in ("-h", "--help")]
    if wants_help and len(words) < 2:
        print(__doc__.rpartition("\n\n")[0])
        return 0
    if not words or words[0].startswith("--"):
        words = ["run", "quickstart", *words]
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command '{name}'; {hint}")
    if not rest or rest[0].startswith("--"):
        raise ConfigError(
            f"'{name}' needs a recipe: a file, or quickstart, cifar10, cifar10-cpu or imagenet256"
        )
    options_class, command = COMMANDS[name]
    own, shared = options_of(options_class), options_of(Recipe)
    if wants_help:
        recipe = load_recipe(rest[0])
        print(f"python run_sweep.py {name} {rest[0]} [--key value ...]")
        print(f"\n{name} - {(command.__doc__ or '').strip()}{help_text(own, options_class())}")
        print(f"\nValues of the recipe{help_text(shared, recipe)}")
        print(
            "\nby_depth (values of single depths) is set in the recipe; an option here wins for every depth."
        )
        return 0
    values = parse(rest[1:], [*own, *shared])
    mine = {o.path for o in own}
    chosen = {path[0]: value for path, value in values.items() if path in mine}
    options = from_dict(options_class, chosen, lambda path: "--" + ".".join(path).replace("_", "-"))
    recipe = load_recipe(rest[0], {path: value for path, value in values.items() if path not in mine})
    return command(recipe, options)


def _resolve(data: DataConfig) -> DataConfig:
    from scaling.data.sources import resolve

    return resolve(data)


def _check_data(data: DataConfig) -> None:
    from scaling.data.sources import open_source

    open_source(data)


def _report(sweep: Path, show: bool) -> None:
    from analysis.report import make_report

    page = make_report(sweep)
    print(f"report: {page}")
    # Without a display a text browser would take over the terminal.
    if show and (
        sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    ):
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


if __name__ == "__main__":
    sys.exit(main())
