"""Where the sweeps and runs lie that a command line names: by a recipe, a sweep's folder or name, or a run's
folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.config import ConfigError
from scaling.records import IMPORTED, ListedRun, RecordsError, RunFolder, read_sweep
from sweeps.recipe import load_recipe, shipped_recipes
from sweeps.tables import started_sweep

if TYPE_CHECKING:
    from scaling.requests import FidelityRequest, ModelChoice


def sweep_at(where: str, root: str, name: str | None) -> Path | None:
    """The folder of a sweep, given itself, by its name under the root or by its recipe; else None.

    Args:
        root: the folder of all sweeps.
        name: of a recipe, the sweep's folder under the root; the recipe's own name when None.

    Raises:
        ConfigError: a sweep here and one under the root have this name; ``name`` for what is no recipe.
    """
    recipe = Path(where).suffix in (".yaml", ".yml") or where in shipped_recipes()
    if recipe and name is not None:
        return Path(root) / name
    known = [f for f in (Path(where), Path(root) / where) if (f / "sweep.json").exists()]
    if not known:
        return Path(root) / load_recipe(where).name if recipe else None
    if name is not None:
        raise ConfigError(f"--name is for a recipe, and {where} is a sweep itself; leave it out")
    if len({folder.resolve() for folder in known}) > 1:
        raise ConfigError(
            f"{where} is a sweep here and another one in {root}: give {known[0].absolute()} or {known[1]}"
        )
    return known[0]


def known_sweep(where: str, root: str, name: str | None) -> Path:
    """The folder of the sweep that ``where`` names, as ``sweep_at``.

    Raises:
        ConfigError: as ``sweep_at``; neither a sweep nor a recipe, with the nearest that are there.
    """
    sweep = sweep_at(where, root, name)
    if sweep is None and Path(where).is_file():
        sweep = Path(root) / (load_recipe(where).name if name is None else name)
    if sweep is not None:
        return sweep
    names = dict.fromkeys([*sweeps_in(root), *shipped_recipes()])
    hint = _nearest(where, root) or f"there are {', '.join(names)}"
    raise ConfigError(
        f"{where}: neither a recipe, nor a sweep's folder, nor a sweep's name in {root}; {hint}"
    )


def _nearest(where: str, root: str) -> str:
    """The sweeps and recipes that may have been meant, as a question; nothing where none is called alike."""
    near = difflib.get_close_matches(where, {*sweeps_in(root), *shipped_recipes()}, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


def refuse_sweep(command: str, where: str, root: str) -> None:
    """``ConfigError`` with the way out where a sweep is named and its recipe is needed."""
    if where in shipped_recipes() or Path(where).is_file():
        return
    if (sweep := sweep_at(where, root, None)) is not None and (sweep / "sweep.json").exists():
        started = read_sweep(sweep).value.get("command", "another program")
        raise ConfigError(f"'{command}' needs a recipe; {where} is a sweep, which was started by: {started}")


def sweeps_in(root: str | Path) -> list[str]:
    """Names of the sweeps under a root."""
    return sorted(file.parent.name for file in Path(root).glob("*/sweep.json"))


def finished_run(sweep: Path, depth: int, family: str | None = None) -> tuple[RunFolder, Path]:
    """The first finished run of a depth and the folder of its tokenizer's run.

    Args:
        family: needed where the sweep has several.

    Raises:
        ConfigError: no family was given and the sweep has several, or it has not the one given.
        RecordsError: the sweep has no finished run of that depth and family.
    """
    listed = started_sweep(sweep)
    several = len({run.family for run in listed}) > 1
    of_family = _of_family(sweep, listed, family)
    depths = set()
    for run in of_family:
        folder = RunFolder(sweep / run.run)
        if folder.status()["state"] == "done":
            found = folder.config()["model"]["depth"]
            depths.add(found)
            if found == depth:
                return folder, (sweep / run.tokenizer).resolve()
    known = ", ".join(map(str, sorted(depths))) or "none yet"
    of = f" of {family}" if several else ""
    raise RecordsError(f"{sweep}: no finished run{of} of depth {depth}; finished depths: {known}")


def runs_by_depth(sweep: Path, family: str | None, depths: Sequence[int] | None) -> list[ListedRun]:
    """A family's runs, smallest first, one of each depth.

    Args:
        family: needed where the sweep has several.
        depths: which; None for all.

    Raises:
        ConfigError: as ``finished_run``, and a depth that the sweep does not have.
    """
    found: dict[int, ListedRun] = {}
    for run in _of_family(sweep, started_sweep(sweep), family):
        found.setdefault(RunFolder(sweep / run.run).config()["model"]["depth"], run)
    for depth in depths or ():
        if depth not in found:
            known = ", ".join(map(str, sorted(found)))
            raise ConfigError(f"--depths: {sweep} has no depth {depth}; it has {known}")
    return [found[depth] for depth in sorted(depths or found)]


def _of_family(sweep: Path, listed: Sequence[ListedRun], family: str | None) -> list[ListedRun]:
    families = list(dict.fromkeys(run.family for run in listed))
    if family is None and len(families) > 1:
        raise ConfigError(f"--family is needed too: {sweep} has {', '.join(families)}")
    if family is not None and family not in families:
        raise ConfigError(f"--family: {sweep} has no {family}; it has {', '.join(families)}")
    return [run for run in listed if run.family == (family or families[0])]


@dataclass(frozen=True)
class Selection:
    """Finished runs of one sweep, and what was left out."""

    sweep: Path
    runs: tuple[RunFolder, ...]
    unfinished: int = 0
    imported: int = 0
    """Published checkpoints among the sweep's runs: no runs of its recipe, named one by one."""


def finished_runs(sweep: Path, depth: int | None, family: str | None) -> Selection:
    """All finished runs of a sweep, or those of a depth or a family.

    Raises:
        ConfigError: the sweep has no such family.
        RecordsError: no such sweep, or no such run is finished.
    """
    listed = started_sweep(sweep)
    if family is not None:
        listed = tuple(_of_family(sweep, listed, family))
    wanted = [RunFolder(sweep / run.run) for run in listed]
    wanted = [run for run in wanted if depth in (None, run.config()["model"]["depth"])]
    done = tuple(run for run in wanted if run.status()["state"] == "done")
    if not done:
        asked = [f"of {family}"] * (family is not None) + [f"of depth {depth}"] * (depth is not None)
        raise RecordsError(f"{sweep}: {' '.join(['no run', *asked])} is finished yet")
    everything = depth is None and family is None
    imported = len(list(sweep.glob(f"{IMPORTED}*/config.json"))) if everything else 0
    return Selection(sweep, done, len(wanted) - len(done), imported)


def selected(where: str, request: FidelityRequest) -> Selection:
    """The finished runs that ``where`` names: of a sweep those asked for, of a run's folder that run.

    Raises:
        ConfigError: neither a sweep nor a run; a depth or a family of a single run, a tokenizer of a sweep.
        RecordsError: as ``finished_runs``; the run is not finished.
    """
    sweep = sweep_at(where, request.root, request.name)
    if sweep is not None:
        if request.tokenizer is not None:
            raise ConfigError("--tokenizer is for a single run; the runs of a sweep have their own")
        return finished_runs(sweep, request.depth, request.family)
    run = RunFolder(where)
    if not (run.path / "config.json").exists():
        hint = _nearest(where, request.root)
        raise ConfigError(
            f"{where}: neither a recipe, nor a sweep's name or folder, nor a run's folder"
            + (f"; {hint}" if hint else "")
        )
    if request.depth is not None or request.family is not None:
        raise ConfigError(f"{where} is a single run; --depth and --family choose among the runs of a sweep")
    state = run.status()["state"]
    if state != "done":
        raise RecordsError(f"{where} is not finished (state: {state})")
    return Selection(run.path.absolute().parent, (run,))


def model_at(where: str, choice: ModelChoice) -> tuple[str, str | None]:
    """What ``open_model`` takes, model and tokenizer: ``where`` itself, or a run of the sweep that it names.

    Raises:
        ConfigError, RecordsError: a sweep without ``--depth``, or without such a finished run.
    """
    sweep = sweep_at(where, choice.root, choice.name)
    if sweep is None:
        if not Path(where).exists() and (hint := _nearest(where, choice.root)):
            raise ConfigError(f"{where}: no such sweep, recipe, run or checkpoint; {hint}")
        return where, choice.tokenizer
    if choice.depth is None:
        raise ConfigError(f"{where} is a sweep: --depth says which of its runs")
    folder, tokenizer = finished_run(sweep, choice.depth, choice.family)
    return str(folder.path), choice.tokenizer or str(tokenizer)
