"""varscale's command line: plan, train, watch and report a depth sweep.

    python run_sweep.py                          the quickstart, from photographs to report
    python run_sweep.py COMMAND RECIPE [--key value ...]

COMMAND is one of
    plan       print what the sweep costs; runs nothing
    tokenize   train the tokenizers and cache the tokens
    run        do everything that is missing, then write the report
    status     print where every job stands
    cancel     end what was handed to Slurm ('run --executor slurm')
    report     write the report of what is there
    stages     draw the same seeds across depths and stages of training
    classifier train a classifier of the images, for 'fidelity' without published weights
    sync       copy a sweep's records to wandb, trackio or tensorboard
    dashboard  show a sweep in wandb's workspace, or in trackio's page on this machine
and six more need no recipe:
    python run_sweep.py sample WHERE [--key value ...]    pictures of a run or a published checkpoint
    python run_sweep.py fidelity WHERE [--key value ...]  FID and other image metrics of a sweep's runs
    python run_sweep.py evaluate WHERE [--key value ...]  loss and error of a run or a published checkpoint
    python run_sweep.py convert WHERE [--key value ...]   a published checkpoint to a folder of ours, or back
    python run_sweep.py edit WHERE IMAGE [--key value ...]  in-painting and other tasks without training
    python run_sweep.py fit TABLE [--key value ...]      fit a scaling law to any table of runs

RECIPE is a file or the name of a shipped recipe: quickstart, cifar10, cifar10-cpu, families-cpu, imagenet256,
wsd-cpu.
plan, tokenize, run and classifier take any value of the recipe: --train.lr 3e-4 --depths 2 4 6 --data.path X.
'python run_sweep.py COMMAND --help' lists a command's own options,
'python run_sweep.py plan RECIPE --help' the values of the recipe too.

Exit codes: 0 done; 1 a run failed; 2 bad input, told in one line; 130 interrupted.

This file only parses and dispatches. Torch is imported by nothing here but ``sample``, ``stages``,
``edit``, ``evaluate`` and ``convert``.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from scaling.config import ConfigError, DataConfig, Tracker, WandbMode, from_dict
from scaling.process import one_line
from scaling.records import RecordsError
from scaling.requests import (
    ClassifierRequest,
    ClassifierRun,
    ConvertRequest,
    EditRequest,
    EvaluateRequest,
    FidelityRequest,
    SampleRequest,
    StagesRequest,
    same_images,
)
from scaling.schema import here, require
from sweeps.command_options import (
    CostOptions,
    DashboardOptions,
    Options,
    ReportOptions,
    RunOptions,
    StatusOptions,
    SweepOptions,
    SyncOptions,
)
from sweeps.forecasts import Forecasts, Point
from sweeps.options import Option, flag_of, help_text, options_of, parse
from sweeps.recipe import Recipe, load_recipe

SCRIPT = "python run_sweep.py"
REFUSED = 2
USER_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""System errors that a person causes and removes; any other is a fault of ours and shows its traceback."""


def plan(recipe: Recipe, options: CostOptions) -> int:
    """print what the sweep costs; runs nothing"""
    from sweeps import commands

    options.check()
    stated = options.stated()
    if options.executor == "slurm":
        from sweeps import slurm_commands

        require(
            stated is None and not options.calibrate,
            "--calibrate, --device and --mfu are not for --executor slurm, which plans by runs done there",
        )
        made = slurm_commands.plan(recipe, Path(options.root), _resolve, options)
        return slurm_commands.show_plan(made, options.json, _check_data, options)
    if options.calibrate:
        require(stated is None, "--calibrate times the device at hand; leave out --device and --mfu")
        made = commands.plan(recipe, Path(options.root), _resolve)
        code = commands.calibrate(made, _check_data, options.json)
        if code != 0:
            return code
    made = commands.plan(recipe, Path(options.root), _resolve, stated)
    return commands.show_plan(made, options.json, _check_data, options, _forecasts)


def tokenize(recipe: Recipe, options: Options) -> int:
    """train the tokenizers and cache the tokens"""
    from sweeps import commands

    if recipe.launch.machine_rank > 0:
        raise ConfigError("tokenize is done by machine 0 alone; start the others with 'run'")
    made = commands.plan(recipe, Path(options.root), _resolve)
    return commands.launch(made, made.stage_jobs, _check_data).exit_code


def run(recipe: Recipe, options: RunOptions) -> int:
    """do everything that is missing, then write the report"""
    from scaling.trackers.targets import check_launch
    from sweeps import commands

    options.check()
    check_launch(recipe.launch)
    if options.executor == "slurm":
        from sweeps import slurm_commands

        made = slurm_commands.plan(recipe, Path(options.root), _resolve, options)
        result = slurm_commands.submit(made, _check_data, options, options.wait)
        if result.missing and not options.wait:
            return 0
    elif options.wait:
        raise ConfigError("--wait is for --executor slurm only")
    else:
        made = commands.plan(recipe, Path(options.root), _resolve)
        if recipe.launch.machine_rank > 0:
            return commands.follow(made)
        result = commands.launch(made, made.jobs, _check_data)
    _tell_trackers(made.folders.sweep)
    if not result.interrupted and commands.runs_done(result):
        _report(made.folders.sweep, options.open)
    return result.exit_code


def status(recipe: Recipe, options: StatusOptions) -> int:
    """print where every job stands"""
    from sweeps.commands import show_status

    return show_status(_sweep(recipe, options), options.json, options.watch, _forecasts)


def cancel(recipe: Recipe, options: SweepOptions) -> int:
    """end what Slurm has of a sweep; what is running checkpoints first"""
    from sweeps import slurm_commands

    return slurm_commands.cancel(_sweep(recipe, options))


def report(recipe: Recipe, options: ReportOptions) -> int:
    """write the report of what is there"""
    _report(_sweep(recipe, options), options.open)
    return 0


def sync(where: str, options: SyncOptions) -> int:
    """copy a sweep's records, report and pictures to trackers: what changed since the last time"""
    from scaling.trackers.sync import settings_of

    sweep = _sweep_at(where, options)
    launch = settings_of(sweep)
    if not (trackers := options.to or launch.trackers):
        raise ConfigError("sync needs --to wandb, trackio or tensorboard: the sweep names no trackers itself")
    project = options.project or launch.tracker_project
    _copy(sweep, trackers, project, options.wandb_mode or launch.wandb_mode)
    if not (sweep / "report").exists():
        print("no report yet: 'report' makes one, then 'sync' takes its figures and laws along")
    return 0


def dashboard(where: str, options: DashboardOptions) -> int:
    """show a sweep in wandb's workspace (loss, error, frontier over FLOPs; throughput) or trackio's page"""
    from scaling.trackers import dashboard as page
    from scaling.trackers.sync import settings_of

    sweep = _sweep_at(where, options)
    project = options.project or settings_of(sweep).tracker_project
    if options.local:
        _copy(sweep, ["trackio"], project, "offline")
        with page.local_page(sweep, project) as address:
            print(f"{address}\nCtrl-C ends it", flush=True)
            _open(address)
            threading.Event().wait()
    else:
        page.check_workspace()
        frontiers = _copy(sweep, ["wandb"], project, "online")
        print(page.make_workspace(sweep, project, frontiers))
    return 0


def sample(where: str, request: SampleRequest) -> int:
    """draw pictures from a run, of a sweep or by its folder, or from a published checkpoint"""
    from sweeps.progress import counted
    from sweeps.where import model_at

    folder, tokenizer = model_at(where, request)

    from scaling.sample_command import sample as draw

    with counted("drawing") as progress:
        found = draw(folder, replace(request, tokenizer=tokenizer), progress)
    print(*found.words, found.grid, sep="\n")
    return 0


def stages(where: str, request: StagesRequest) -> int:
    """draw the same seeds across depths and stages of training, on one sheet (needs evaluation.snapshots)"""
    from sweeps.progress import counted
    from sweeps.where import runs_by_depth, sweep_at

    sweep = sweep_at(where, request.root, request.name) or Path(where)
    listed = runs_by_depth(sweep, request.family, request.depths)

    from scaling.stages_command import StagedRun, draw_stages

    runs = [StagedRun(*((sweep / part).resolve() for part in (r.run, r.tokenizer, r.tokens))) for r in listed]
    out = sweep / f"stages-{listed[0].family}.png" if request.out is None else Path(request.out)
    with counted("drawing") as progress:
        print(draw_stages(runs, request, out, progress))
    return 0


def classifier(recipe: Recipe, request: ClassifierRequest) -> int:
    """train a classifier of the recipe's images, to look at pictures where no published weights are"""
    from sweeps.fidelity import train_classifier

    data = same_images(_resolve(recipe.data))
    run = ClassifierRun(data, request.training)
    return train_classifier(Path(request.root), run, recipe.launch, _check_data(data))


def fidelity(where: str, request: FidelityRequest) -> int:
    """FID, inception score, precision and recall of the pictures of finished runs, added to their records"""
    from sweeps.fidelity import measure
    from sweeps.where import selected

    _ = request.chosen  # the cheap refusal first
    selection = selected(where, request)
    code = measure(selection, request)
    if code == 0 and (selection.sweep / "report" / "report.html").exists():
        _report(selection.sweep, show=False)
    return code


def edit(words: tuple[str, str], request: EditRequest) -> int:
    """edit IMAGE, a file or val:N of the run's data: in- and out-painting, a class, refinement, expansion"""
    where, image = words
    _ = request.chosen  # the cheap refusal first
    from sweeps.where import model_at

    folder, tokenizer = model_at(where, request)

    from scaling.edit_command import edit as edit_image

    report = edit_image(folder, image, replace(request, tokenizer=tokenizer))
    print(*report.words, report.sheet, sep="\n")
    return 0


def evaluate(where: str, request: EvaluateRequest) -> int:
    """loss and error of a run or of a published checkpoint on validation images"""
    from sweeps.progress import counted
    from sweeps.where import model_at

    where, tokenizer = model_at(where, request)
    request = replace(request, tokenizer=tokenizer)

    from scaling.imported import import_into, training_of
    from scaling.validation import validate

    training = None if request.into is None else training_of(where, request)
    with counted("encoding") as progress:
        result = validate(where, request, progress)
    if request.json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        print(result.table())
    if request.into is not None and training is not None:
        run = import_into(request.into, result, training)
        print(f"imported: {run.path}; its tokens and FLOPs: {training.told}", file=sys.stderr)
    return 0


def convert(where: str, request: ConvertRequest) -> int:
    """a published file to a folder of this project (safetensors and JSON), or back"""
    if request.to is None or request.out is None:
        raise ConfigError("convert needs --to (varscale or published) and --out (where to write)")

    from scaling.convert import convert as convert_files

    print(*convert_files(where, request), sep="\n")
    return 0


def fit(table: str, options: Any) -> int:
    """fit a scaling law to a table of runs (CSV, JSON lines and others), of any project"""
    from analysis.table_fit import fit_table

    print(fit_table(table, options))
    return 0


def _fit_options() -> type:
    from analysis.table_fit import FitOptions

    return FitOptions


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    do: Callable[[Any, Any], int]
    """From what the first word names and the options to the exit code; its docstring is its help."""
    options: Callable[[], type]
    """The dataclass of its own options; a function, since not all of them are cheap to import."""
    takes: Literal["recipe", "sweep", "runs", "table", "model"]
    """What its first word names: a recipe whose values can be set, the sweep of a recipe as it is on the
    disk, finished runs (a sweep's or one), a file with a table, or a model (a run's folder, a sweep with a
    depth, or a checkpoint)."""
    further: tuple[str, ...] = ()
    """Words after the first; then both are given together."""


COMMANDS = {
    "plan": Command(plan, lambda: CostOptions, "recipe"),
    "tokenize": Command(tokenize, lambda: Options, "recipe"),
    "run": Command(run, lambda: RunOptions, "recipe"),
    "status": Command(status, lambda: StatusOptions, "sweep"),
    "cancel": Command(cancel, lambda: SweepOptions, "sweep"),
    "report": Command(report, lambda: ReportOptions, "sweep"),
    "sync": Command(sync, lambda: SyncOptions, "runs"),
    "dashboard": Command(dashboard, lambda: DashboardOptions, "runs"),
    "sample": Command(sample, lambda: SampleRequest, "model"),
    "stages": Command(stages, lambda: StagesRequest, "model"),
    "classifier": Command(classifier, lambda: ClassifierRequest, "recipe"),
    "fidelity": Command(fidelity, lambda: FidelityRequest, "runs"),
    "edit": Command(edit, lambda: EditRequest, "model", ("IMAGE",)),
    "evaluate": Command(evaluate, lambda: EvaluateRequest, "model"),
    "convert": Command(convert, lambda: ConvertRequest, "model"),
    "fit": Command(fit, _fit_options, "table"),
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
    if wants_help and not words:
        print(__doc__.rpartition("\n\n")[0])
        return 0
    if not words or words[0].startswith("--"):
        words = ["run", "quickstart", *words]
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command '{name}'; {hint}")
    command = COMMANDS[name]
    first = rest[0] if rest and not rest[0].startswith("--") else None
    if wants_help:
        print(_help(name, command, first))
        return 0
    if first is None:
        wanted = {
            "table": "a table: a file with one row per run or evaluation",
            "model": "a model: a run's folder, a recipe or sweep with --depth, or a checkpoint",
            "runs": "a recipe, a sweep's folder or a run's",
        }
        recipes = (
            "a recipe: a file, or quickstart, cifar10, cifar10-cpu, families-cpu, imagenet256 or wsd-cpu"
        )
        raise ConfigError(f"'{name}' needs {wanted.get(command.takes, recipes)}")
    words = rest[: 1 + len(command.further)]
    for word, given in zip_longest(command.further, words[1:]):
        if given is None or given.startswith("--"):
            raise ConfigError(f"'{name}' needs {word} after {words[0]}")
    own = options_of(command.options())
    shared = options_of(Recipe) if command.takes == "recipe" else []
    if command.takes == "sweep":
        _refuse_recipe_values(name, rest[1:], own)
    values = parse(rest[len(words) :], [*own, *shared])
    mine = {o.path for o in own}
    chosen = _nested({path: value for path, value in values.items() if path in mine})
    options: Any = from_dict(command.options(), chosen, lambda path: flag_of(path) if path else here(path))
    if command.takes in ("runs", "table", "model"):
        return command.do(tuple(words) if command.further else first, options)
    recipe = load_recipe(first, {path: value for path, value in values.items() if path not in mine})
    return command.do(recipe, options)


def _help(name: str, command: Command, first: str | None) -> str:
    """A command's own options first; the recipe's values where it takes them and a recipe is named."""
    own = options_of(command.options())
    word = {"table": "TABLE", "model": "WHERE", "runs": "WHERE"}.get(command.takes, "RECIPE")
    text = f"{SCRIPT} {name} {' '.join([first or word, *command.further])} [--key value ...]\n\n"
    text += f"{name} - {command.do.__doc__}\n{help_text(own, command.options()())}"
    if command.takes == "sweep":
        text += (
            "\n\nThe sweep is read as it is on the disk: values of the recipe cannot be set here "
            f"('{SCRIPT} plan {first or 'RECIPE'} --help' lists them)."
        )
    elif command.takes == "recipe" and first is None:
        text += f"\n\nAny value of the recipe too: '{SCRIPT} {name} RECIPE --help' lists them."
    elif command.takes == "recipe":
        assert first is not None
        text += (
            f"\n\nValues of the recipe\n{help_text(options_of(Recipe), load_recipe(first))}"
            "\n\nby_family and by_depth (values of single families and depths) are set in the recipe; "
            "an option wins for all of them. So are grid, zip and lr_rule (docs/designs.md)."
        )
    return text


def _nested(values: dict[tuple[str, ...], Any]) -> dict[str, Any]:
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


def _sweep(recipe: Recipe, options: SweepOptions) -> Path:
    return Path(options.root) / (recipe.name if options.name is None else options.name)


def _sweep_at(where: str, options: SweepOptions) -> Path:
    from sweeps.where import sweep_at

    sweep = sweep_at(where, options.root, options.name)
    if sweep is None:
        raise ConfigError(f"{where}: neither a sweep's folder nor a recipe")
    return sweep


def _copy(sweep: Path, trackers: Sequence[Tracker], project: str, mode: WandbMode) -> list[str]:
    """Copy the sweep to each tracker and tell it; the names of its frontiers."""
    from analysis.sweep_frontiers import sweep_frontiers
    from scaling.trackers.sync import sync as sync_to
    from scaling.trackers.targets import check

    check(trackers, mode)
    frontiers = sweep_frontiers(sweep)
    for tracker in trackers:
        done = sync_to(sweep, tracker, project, mode, frontiers, lambda name: print(f"  {name}"))
        print(done.words(tracker))
    return list(frontiers)


def _tell_trackers(sweep: Path) -> None:
    """What went wrong with the copies made beside the runs, one line a tracker."""
    from scaling.trackers.ledger import notes

    for tracker, (runs, reason) in notes(sweep).items():
        print(
            f"note: {tracker} lacks {runs} run{'s' if runs > 1 else ''} ({reason}); the records are whole, "
            f"'{SCRIPT} sync {sweep} --to {tracker}' copies them"
        )


def _resolve(data: DataConfig) -> DataConfig:
    from scaling.data.sources import resolve

    return resolve(data)


def _check_data(data: DataConfig) -> str:
    from scaling.data.sources import open_source

    return open_source(data).fingerprint()


def _forecasts(sweep: Path, points: Mapping[str, Point]) -> Forecasts:
    """What the finished runs of a sweep say of the others."""
    from analysis.expectation import Place, expect

    return expect(sweep, {run: Place(*point) for run, point in points.items()})


def _report(sweep: Path, show: bool) -> None:
    from analysis.report import make_report

    page = make_report(sweep)
    print(f"report: {page}")
    if show:
        _open(page.resolve().as_uri())


def _open(address: str) -> None:
    """In a browser; without a display a text browser would take over the terminal."""
    if sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
        import webbrowser

        webbrowser.open(address)


if __name__ == "__main__":
    sys.exit(main())
