"""varscale's command line: plan, train, watch and report a depth sweep. Without a command it runs the
quickstart, from photographs to report.

plan, tokenize, run and classifier take any value of the recipe: --train.lr 3e-4 --depths 2 4 6 --data.path X.
'python run_sweep.py COMMAND --help' lists a command's own options, 'python run_sweep.py plan RECIPE --help'
the values of the recipe too.

Exit codes: 0 done; 1 a run failed; 2 bad input, told in one line; 130 interrupted.

This file says what each command does; ``sweeps.command_line`` finds it in the words. Torch is imported by
nothing here but ``sample``, ``stages``, ``edit`` and ``convert``.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling.config import ConfigError, DataConfig, Tracker, WandbMode
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
from scaling.schema import require
from sweeps.command_line import Command, dispatch
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
from sweeps.recipe import Recipe

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


def status(sweep: Path, options: StatusOptions) -> int:
    """print where every job stands"""
    from sweeps.commands import show_status

    return show_status(sweep, options.json, options.watch, _forecasts)


def cancel(sweep: Path, options: SweepOptions) -> int:
    """end what Slurm has of a sweep; what is running checkpoints first"""
    from sweeps import slurm_commands

    return slurm_commands.cancel(sweep)


def report(sweep: Path, options: ReportOptions) -> int:
    """write the report of what is there"""
    _report(sweep, options.open)
    return 0


def sync(sweep: Path, options: SyncOptions) -> int:
    """copy a sweep's records, report and pictures to trackers: what changed since the last time"""
    from scaling.trackers.sync import settings_of

    launch = settings_of(sweep)
    if not (trackers := options.to or launch.trackers):
        raise ConfigError("sync needs --to wandb, trackio or tensorboard: the sweep names no trackers itself")
    project = options.project or launch.tracker_project
    _copy(sweep, trackers, project, options.wandb_mode or launch.wandb_mode)
    if not (sweep / "report").exists():
        print("no report yet: 'report' makes one, then 'sync' takes its figures and laws along")
    return 0


def dashboard(sweep: Path, options: DashboardOptions) -> int:
    """show a sweep in wandb's workspace (loss, error, frontier over FLOPs; throughput) or trackio's page"""
    from scaling.trackers import dashboard as page
    from scaling.trackers.sync import settings_of

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


def stages(sweep: Path, request: StagesRequest) -> int:
    """draw the same seeds across depths and stages of training, on one sheet (stages before the last need
    evaluation.snapshots)"""
    from sweeps.progress import counted
    from sweeps.where import runs_by_depth

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
    """edit IMAGE, a file or val:N of the run's data: paint a part anew or beyond it, refine, expand"""
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
    from sweeps.evaluation import evaluate as evaluate_model
    from sweeps.where import model_at

    where, tokenizer = model_at(where, request)
    return evaluate_model(where, replace(request, tokenizer=tokenizer))


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


COMMANDS = {
    "plan": Command(plan, lambda: CostOptions, "recipe"),
    "tokenize": Command(tokenize, lambda: Options, "recipe"),
    "run": Command(run, lambda: RunOptions, "recipe"),
    "status": Command(status, lambda: StatusOptions, "sweep"),
    "cancel": Command(cancel, lambda: SweepOptions, "sweep"),
    "report": Command(report, lambda: ReportOptions, "sweep"),
    "sync": Command(sync, lambda: SyncOptions, "sweep"),
    "dashboard": Command(dashboard, lambda: DashboardOptions, "sweep"),
    "sample": Command(sample, lambda: SampleRequest, "model"),
    "stages": Command(stages, lambda: StagesRequest, "sweep"),
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
        words = sys.argv[1:] if arguments is None else arguments
        about = __doc__.rpartition("\n\n")[0]
        return dispatch(COMMANDS, SCRIPT, about, words, default=("run", "quickstart"))
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
