"""A sweep on a screen: a workspace of wandb's, or trackio's page on this machine.

- The workspace needs the extra ``wandb-workspaces``: wandb's own client cannot make one.
- trackio's page is its own server on this machine alone (127.0.0.1).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from scaling.config import ConfigError
from scaling.process import one_line
from scaling.records import RecordsError, list_runs
from scaling.trackers.copies import SUMMARY, trackio_project
from scaling.trackers.ledger import entries, held, remember
from scaling.trackers.targets import has_key

LOSSES, ERRORS = ("loss_avg", "loss_last"), ("error_avg", "error_last")
WORKSPACE = "workspace"
"""Where the ledger of the sweep's summary keeps the workspace's address."""


def check_workspace() -> None:
    """Refuse before anything is sent.

    Raises:
        ConfigError: the package or the key is missing.
    """
    otherwise = "or take --local (trackio's page), or 'report'"
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(
            'the wandb workspace needs a package more: pip install "varscale[wandb-workspaces]"; ' + otherwise
        )
    if not has_key():
        raise ConfigError(
            f"a wandb workspace needs a key; set WANDB_API_KEY or run 'wandb login', {otherwise}"
        )


def make_workspace(sweep: Path, project: str, frontiers: Sequence[str], entity: str | None = None) -> str:
    """Make the sweep's workspace, or bring the one that was made before up to date; its address.

    Args:
        frontiers: names of the frontiers that the sweep's copy has.
        entity: of the project; the key's own when None.

    Raises:
        RecordsError: wandb refused or was not reached.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    place = sweep / SUMMARY
    try:
        entity = entity or str(wandb.Api().default_entity)
        url = entries(place).get(WORKSPACE, {}).get("url")
        view = ws.Workspace(entity=entity, project=project) if url is None else ws.Workspace.from_url(url)
        view.name = f"varscale: {sweep.name}"
        view.sections = sections(sweep, frontiers)
        view.settings = ws.WorkspaceSettings(max_runs=200)
        view.runset_settings = ws.RunsetSettings(filters=[ws.Metric("Group") == sweep.name])
        view.save()
    except Exception as error:  # whatever the two packages raise
        raise RecordsError(f"wandb workspace of {sweep.name}: {one_line(error)}") from error
    with held(place, patience=10.0) as mine:
        if mine:
            remember(place, WORKSPACE, {"url": view.url})  # type: ignore[arg-type]
    return str(view.url)


def sections(sweep: Path, frontiers: Sequence[str]) -> list[Any]:
    """The panels: loss and error against FLOPs on logarithmic axes, frontier, throughput, figures.

    One line per depth: the runs of a depth, which differ in their seed, are one line. Of several families
    each run is a line, since a depth means another model in each.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    families = {run.config()["model"].get("family") for run in list_runs(sweep)}
    by_depth: dict[str, Any] = {}
    if len(families) == 1:
        by_depth = {
            "groupby": wr.Config("model.depth"),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "minmax",
        }

    def against_flops(names: Sequence[str], **more: Any) -> list[Any]:
        return [
            wr.LinePlot(
                title=name, x="flops", y=[name], log_x=True, log_y=True, title_x="training FLOPs", **more
            )
            for name in names
        ]

    figures = sorted(file.stem for file in (sweep / "report" / "figures").glob("*.png"))
    speed = wr.LinePlot(title="images per second", x="step", y=["train/images_per_second"])
    found = [
        ws.Section("Loss", against_flops([f"eval/{name}" for name in LOSSES], **by_depth), is_open=True),
        ws.Section("Error", against_flops([f"eval/{name}" for name in ERRORS], **by_depth), is_open=True),
        ws.Section("Frontier", against_flops([f"frontier/{name}" for name in frontiers]), is_open=True),
        ws.Section("Throughput", [speed]),
        ws.Section(
            "Figures", [wr.MediaBrowser(title=name, media_keys=[f"media/{name}"]) for name in figures]
        ),
        ws.Section("Samples", [wr.MediaBrowser(media_keys=["media/samples"])]),
    ]
    return [section for section in found if section.panels]


@contextlib.contextmanager
def local_page(sweep: Path, project: str) -> Iterator[str]:
    """Serve trackio's page of the sweep on this machine; its address, for reading only.

    It opens with losses and errors over FLOPs, unsmoothed. Logarithmic axes are two boxes on the page, which
    no address can tick.
    """
    import trackio

    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # it prints an address with a token that lets others write
        server, address, *_ = trackio.show(open_browser=False, block_thread=False)
    view = {
        "project": trackio_project(project, sweep.name), "x_axis": "flops", "smoothing": 0,
        "metric_filter": f"(eval|frontier)/.*({'|'.join((*LOSSES, *ERRORS))})$",
    }  # fmt: skip
    try:
        yield f"{address.rstrip('/')}/?{urlencode(view)}"
    finally:
        server.close()
