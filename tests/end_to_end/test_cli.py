"""The command line as a person meets it: exit codes, one clear line, and no torch where none is needed."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import run_sweep
from scaling.config import DataConfig
from scaling.records import RunFolder
from sweeps import commands
from sweeps.commands import plan as make_plan
from sweeps.options import options_of
from sweeps.recipe import load_recipe
from sweeps.scheduler import JobState

ROOT = Path(__file__).parents[2]

NO_TORCH = """
import sys
sys.argv[0] = "run_sweep.py"
import run_sweep
code = run_sweep.main()
sys.exit(99 if {"torch", "accelerate"} & sys.modules.keys() else code)
"""


def cli(*words: str | Path, no_torch: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-c", NO_TORCH] if no_torch else [str(ROOT / "run_sweep.py")]
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(*words: str | Path) -> str:
    """The one line of a refusal."""
    result = cli(*words)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def write_sweep(root: Path) -> list[RunFolder]:
    """The folders of a started quickstart in which nothing has run."""
    recipe = load_recipe("quickstart", {("data", "num_classes"): 20})
    made = make_plan(recipe, root, lambda data: data)
    made.write()
    return [job.folder for job in made.jobs]


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plan", "--help"),
        ("sample", "quickstart", "--help"),
        ("edit", "--help"),
        ("fidelity", "--help"),
        ("classifier", "quickstart", "--help"),
        ("evaluate", "--help"),
        ("convert", "--help"),
        ("plan", "quickstart", "--help"),
        ("plan", "quickstart"),
        ("plan", "quickstart", "--json"),
        ("plan", "imagenet256", "--depths", "6", "30"),
        ("plan", "imagenet256", "--device", "h100", "--mfu", "0.4", "--price", "2.5", "--energy"),
        ("plan", "families-cpu", "--families", "raster", "flexvar"),
    ],
)
def test_planning_and_help_need_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    root = () if "--help" in words else ("--root", str(tmp_path))
    result = cli(*words, *root, no_torch=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [], "looking changes nothing"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluate",), "'evaluate' needs a model"),
        (("evaluate", "quickstart"), "--depth says which of its runs"),
        (("evaluate", "net.pth"), "net.pth: no such file (files of the hub are named owner/repo:file)"),
        (("evaluate", "net.pth", "--data.sourc", "folder"), "did you mean --data.source?"),
        (("evaluate", "net.pth", "--data.source", "imagenet"), "--data.source: expected one of"),
        (("evaluate", "net.pth", "--epochs", "3"), "--epochs is for --into SWEEP"),
        (("evaluate", "net.pth", "--into", "runs/x"), "nothing says how long net was trained"),
        (("convert", "net.pth"), "convert needs --to (varscale or published) and --out"),
        (("convert", "net.pth", "--to", "published", "--out", "x.bin"), "ends in .pth or .safetensors"),
    ],
)
def test_models_that_are_not_there_are_one_line(words: tuple[str, ...], told: str) -> None:
    assert told in refused(*words)


def test_a_checkpoint_that_runs_code_is_one_line_and_runs_nothing(tmp_path: Path) -> None:
    proof, attack = tmp_path / "proof", tmp_path / "net.pth"
    attack.write_bytes(b"cposix\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR.")
    assert str(attack) in refused("evaluate", attack, "--tokenizer", attack)
    assert str(attack) in refused("convert", attack, "--to", "varscale", "--out", tmp_path / "ours")
    assert not proof.exists()
    pickle.loads(attack.read_bytes())
    assert proof.exists()  # the attack works where it is let


def test_status_needs_no_torch_and_shows_every_job(tmp_path: Path) -> None:
    folders = write_sweep(tmp_path)
    folders[2].set_status("running", step=30, total_steps=300, loss=4.5, images_per_second=800.0)
    folders[3].set_status("failed", error="ValueError: loss is not a number")
    result = cli("status", "quickstart", "--root", tmp_path, no_torch=True)
    assert (result.returncode, result.stderr) == (0, "")
    for folder in folders[2:]:
        assert folder.name in result.stdout
    assert "30/300" in result.stdout
    assert "4.500" in result.stdout
    assert "ValueError: loss is not a number" in result.stdout
    states = json.loads(cli("status", "quickstart", "--root", tmp_path, "--json").stdout)
    assert states[folders[2].name]["step"] == 30
    assert states["tokenizer"]["state"] == "waiting"
    # What is under way or still to come is not missing; what failed is told with its cause.
    assert f"{folders[3].name}: ValueError: loss is not a number" in result.stdout
    assert f"0 of {len(states)} jobs done" in result.stdout


def test_status_tells_a_diverged_run_from_one_that_failed(tmp_path: Path) -> None:
    folders = write_sweep(tmp_path)
    for folder in folders:
        folder.set_status("done")
    folders[2].fail("the loss became nan at step 7", 1, "diverged")
    shown = cli("status", "quickstart", "--root", tmp_path).stdout
    assert "diverged" in shown
    assert f"missing: {folders[2].name} (diverged)\n" in shown
    folders[2].set_status("done")
    assert "all done" in cli("status", "quickstart", "--root", tmp_path).stdout


def test_report_needs_no_torch_even_when_there_is_nothing_to_report(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    assert cli("report", "quickstart", "--root", tmp_path, no_torch=True).returncode == 2


def test_the_plan_lists_every_run_with_the_overrides(tmp_path: Path) -> None:
    result = cli("plan", "quickstart", "--root", tmp_path, "--depths", "2", "4", "--train.batch", "32")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("var-d")]
    assert [row[1] for row in rows] == ["2", "4"]
    assert [row[5] for row in rows] == ["32", "32"]


@pytest.mark.parametrize("command", ["status", "report"])
def test_commands_that_read_a_sweep_refuse_values_of_the_recipe(tmp_path: Path, command: str) -> None:
    write_sweep(tmp_path)
    for words in (("--train.lr", "3e-4"), ("--tokenizer_train.steps=7",), ("--launch.processes", "2")):
        flag = words[0].partition("=")[0].replace("_", "-")
        message = refused(command, "quickstart", "--root", tmp_path, *words)
        assert message.startswith(f"{flag} is a value of the recipe, which '{command}' does not use")
        assert "--root" in message
    assert "did you mean --root?" in refused(command, "quickstart", "--rot", tmp_path)


def test_a_sweep_under_another_name_can_be_read(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (tmp_path / "quickstart").rename(tmp_path / "mine")
    assert refused("status", "quickstart", "--root", tmp_path).startswith(str(tmp_path / "quickstart"))
    for words in (("quickstart", "--name", "mine"), ("mine",), (tmp_path / "mine",)):
        found = cli("status", *words, "--root", tmp_path, "--json")
        assert json.loads(found.stdout).keys() >= {"tokenizer", "tokens"}


@pytest.mark.parametrize("command", run_sweep.COMMANDS)
def test_help_shows_a_commands_own_options_first_and_all_of_them(command: str) -> None:
    own = options_of(run_sweep.COMMANDS[command].options())
    for words in ((command,), (command, "quickstart")):
        if words[1:] and run_sweep.COMMANDS[command].takes == "table":
            continue
        text = cli(*words, "--help").stdout
        places = [text.index(f"  {option.flag} ") for option in own]
        assert all(option.doc and option.doc.split()[0] in text for option in own)
        if words[1:] and run_sweep.COMMANDS[command].takes == "recipe":
            assert max(places) < text.index("Values of the recipe") < text.index("  --train.lr ")
        else:
            assert "--train.lr" not in text
            assert len(text.splitlines()) < 60


def test_missing_data_is_told_by_plan_as_by_run(tmp_path: Path) -> None:
    words = ("cifar10", "--root", tmp_path / "runs", "--data.path", tmp_path / "nowhere")
    planned = cli("plan", *words)
    assert planned.returncode == 0, "a plan needs no data"
    error = refused("run", *words)
    assert cli("run", *words).stdout == "", "looked for before anything is planned"
    assert planned.stdout.splitlines()[0] == f"MISSING DATA: {error}"
    assert planned.stdout.splitlines()[-1] == "the data is not there: see the top"
    assert "'run' and 'tokenize' will stop with this error" in planned.stdout
    assert json.loads(cli("plan", *words, "--json").stdout)["missing_data"] == error
    (tmp_path / "nowhere").mkdir()
    assert f"MISSING DATA: {refused('run', *words)}" in cli("plan", *words).stdout.splitlines()
    assert "MISSING" not in cli("plan", "quickstart", "--root", tmp_path).stdout


def test_photographs_of_other_classes_are_told_by_plan_already(tmp_path: Path) -> None:
    told = "data.num_classes is 20, photos has 18 classes"
    for command in ("plan", "run"):
        assert refused(command, "quickstart", "--root", tmp_path, "--data.num-classes", "20") == told


def test_tokenize_is_not_for_the_other_machines(tmp_path: Path) -> None:
    two = ("--launch.machines", "2", "--launch.main-address", "here", "--launch.machine-rank", "1")
    assert "tokenize is done by machine 0 alone" in refused(
        "tokenize", "quickstart", "--root", tmp_path, *two
    )
    assert "launch.main_address" in refused("run", "quickstart", "--launch.machines", "2")


def test_a_speed_that_cannot_be_told_or_kept_is_a_note_and_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VARSCALE_CACHE", str(tmp_path / "cache"))
    made = make_plan(load_recipe("quickstart"), tmp_path, _counted)
    (tmp_path / "cache").write_text("a file where the folder should be")
    for step in range(20, 120, 20):
        made.jobs[0].folder.append({"kind": "train", "step": step, "images_per_second": 1e6})
    state = JobState(made.jobs[0], from_scratch=True, seconds=10.0)
    out = io.StringIO()
    commands._calibrate(made, state, Console(file=out, width=200))
    assert out.getvalue().startswith("note: this speed is not remembered")
    (tmp_path / "cache").unlink()
    metrics = made.jobs[0].folder.path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("not a record\n" + whole)
    commands._calibrate(made, state, Console(file=out, width=200))
    assert "metrics.jsonl, line 1: not valid JSON" in out.getvalue().splitlines()[-1]
    metrics.write_text(whole)
    commands._calibrate(made, state, Console(file=out))
    assert make_plan(load_recipe("quickstart"), tmp_path, _counted).jobs[0].seconds == pytest.approx(10.0)


TABLE = "run,params,tokens,loss\n" + "".join(
    f"r{i},{n},{20 * n},{1.7 + 400 * n**-0.34}\n" for i, n in enumerate((1e7, 3e7, 1e8, 3e8, 1e9, 3e9))
)


def test_a_law_is_fitted_to_any_table_without_a_recipe_or_torch(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(TABLE)
    result = cli("fit", file, "--x", "N", "--offset", no_torch=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "0.34" in result.stdout
    assert isinstance(json.loads(cli("fit", file, "--json").stdout), dict)


def test_a_table_that_cannot_be_fitted_is_one_line(tmp_path: Path) -> None:
    assert "needs a table" in refused("fit")
    assert str(tmp_path / "nothing.csv") in refused("fit", tmp_path / "nothing.csv")
    file = tmp_path / "runs.csv"
    file.write_text(TABLE)
    assert "did you mean --offset?" in refused("fit", file, "--ofset")
    assert "expected one of" in refused("fit", file, "--law", "cubic")
    assert "unknown option --train.lr" in refused("fit", file, "--train.lr", "1")
    file.write_text(TABLE.replace("loss", "perplexity"))
    assert "loss" in refused("fit", file)


def test_a_wrong_command_or_recipe_is_told_with_the_nearest(tmp_path: Path) -> None:
    assert refused("plna", "quickstart") == "unknown command 'plna'; did you mean 'plan'?"
    assert "needs a recipe" in refused("plan")
    assert "did you mean quickstart?" in refused("plan", "quikstart")
    assert (
        refused("plan", "quickstart", "--train.lrr", "1")
        == "unknown option --train.lrr; did you mean --train.lr?"
    )
    assert refused("plan", "quickstart", "--train.lr", "x").startswith("--train.lr: expected a number")


def test_a_wrong_recipe_is_told_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (ROOT / "sweeps" / "quickstart.yaml").read_text()
    file.write_text(text.replace("  lr: 2.0e-3   ", "  lrate: 2.0e-3   "))
    line = 1 + [x.strip().startswith("lrate") for x in file.read_text().splitlines()].index(True)
    assert refused("plan", file).startswith(
        f"{file}, line {line} (train.lrate): unknown key 'lrate'; did you mean"
    )
    assert "must end at the latent size 4" in refused(
        "plan", "quickstart", "--tokenizer.scales", "1", "2", "3"
    )


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_missing_and_empty_data_is_refused_before_anything_is_made(tmp_path: Path, source: str) -> None:
    root, empty = tmp_path / "runs", tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "nowhere", empty):
        words = ("--root", str(root), "--data.source", source, "--data.path", str(path))
        assert str(path) in refused("run", "cifar10", *words)
        assert str(path) in refused("plan", "cifar10", *words, "--data.train-images", "none")
    assert not root.exists()


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    first = json.loads(cli("plan", "quickstart", "--root", tmp_path, "--json").stdout)
    name = first["runs"][0]["run"]
    folder = RunFolder(tmp_path / "quickstart" / name)
    folder.create({"another": "config"})
    message = refused("run", "quickstart", "--root", tmp_path)
    assert str(folder.path) in message
    assert "choose another sweep name or remove the folder" in message


def test_status_report_and_sample_of_a_sweep_that_was_never_started(tmp_path: Path) -> None:
    for words in (("status",), ("report",), ("sample", "--depth", "3")):
        command, *rest = words
        assert str(tmp_path / "quickstart") in refused(command, "quickstart", "--root", tmp_path, *rest)


def test_sample_says_which_depths_are_there_and_checks_what_it_is_asked(tmp_path: Path) -> None:
    folders = write_sweep(tmp_path)
    folders[3].set_status("done")
    root = ("--root", tmp_path)
    assert refused("sample", "quickstart", *root) == "quickstart is a sweep: --depth says which of its runs"
    assert "finished depths: 2" in refused("sample", "quickstart", *root, "--depth", "5")
    assert "--count must be at least 1" in refused(
        "sample", "quickstart", *root, "--depth", "2", "--count", "0"
    )


def test_sample_needs_the_family_where_there_are_several(tmp_path: Path) -> None:
    made = make_plan(load_recipe("families-cpu", {("depths",): [1]}), tmp_path, lambda data: data)
    made.write()
    made.run_jobs[1].folder.set_status("done")
    root = ("--root", tmp_path, "--depth", "1")
    assert "--family is needed too: " in refused("sample", "families-cpu", *root)
    assert "no finished run of var of depth 1; finished depths: none yet" in refused(
        "sample", "families-cpu", *root, "--family", "var"
    )
    assert "has no rastr; it has var, flexvar, flexvar-mamba, raster" in refused(
        "sample", "families-cpu", *root, "--family", "rastr"
    )
    assert "has no final weights yet" in refused("sample", "families-cpu", *root, "--family", "flexvar")


def test_status_names_the_jobs_of_every_tokenizer(tmp_path: Path) -> None:
    made = make_plan(load_recipe("families-cpu"), tmp_path, lambda data: data)
    made.write()
    states = json.loads(cli("status", "families-cpu", "--root", tmp_path, "--json").stdout)
    assert list(states) == [job.name for job in made.jobs]
    assert sum(name.startswith("tokenizer tok-32px-v512-") for name in states) == 2


def test_a_list_of_runs_of_another_form_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    file = tmp_path / "quickstart" / "sweep.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"runs": [run["run"] for run in value["runs"]]}))
    for command in ("status", "report"):
        assert refused(command, "quickstart", "--root", tmp_path).startswith(
            f"{file}: expected an object with a list of runs"
        )


def test_a_damaged_file_of_ours_is_named(tmp_path: Path) -> None:
    folders = write_sweep(tmp_path)
    (folders[4].path / "status.json").write_text('{"state": "runn')
    assert str(folders[4].path / "status.json") in refused("status", "quickstart", "--root", tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EEXIST])
def test_a_full_or_locked_disk_is_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "sweep.json"))

    monkeypatch.setattr("sweeps.plan.write_json", fails)
    monkeypatch.setattr(run_sweep, "_check_data", lambda data: "fingerprint")
    monkeypatch.setattr(run_sweep, "_resolve", _counted)
    assert run_sweep.main(["run", "quickstart", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "sweep.json") in error


def _counted(data: DataConfig) -> DataConfig:
    return load_recipe("quickstart", {("data", "num_classes"): 20}).data


def test_a_sweep_that_is_done_trains_nothing_and_writes_the_report_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_sweep, "_resolve", _counted)
    made = make_plan(load_recipe("quickstart"), tmp_path, _counted)
    made.write()
    for job in made.jobs:
        (job.folder.path / job.product).parent.mkdir(parents=True, exist_ok=True)
        (job.folder.path / job.product).write_text("")
        job.folder.set_status("done")
    reported: list[Path] = []
    monkeypatch.setattr(run_sweep, "_report", lambda sweep, show: reported.append(sweep))
    assert run_sweep.main(["run", "quickstart", "--root", str(tmp_path)]) == 0
    assert "everything is done already" in capsys.readouterr().out
    assert reported == [made.folders.sweep]
    assert not list(tmp_path.rglob("log.txt")), "nothing was started"
