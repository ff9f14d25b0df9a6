"""Which way imports run (DESIGN): read from the syntax trees of all files, and tried in fresh processes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("scaling", "sweeps", "analysis")
FILES = sorted(f for house in HOUSES for f in (ROOT / house).rglob("*.py"))
TORCH_FREE = (
    *("scaling.config", "scaling.schema", "scaling.flops", "scaling.records", "scaling.process"),
    *("scaling.requests", "scaling.steps", "scaling.launch"),
)
OPEN_TO_SWEEPS = {"scaling", "scaling.config", "scaling.flops", "scaling.records"}
OPEN_TO_ANALYSIS = {"scaling", "scaling.records"}
BEHIND_CONFIG = ("scaling.data.config", "scaling.tokenizer.config")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(f): f for f in FILES}


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(nodes: list[ast.stmt], at_start: bool) -> Iterator[str]:
    """Modules that these statements import when they run, not those named for the type checker only.

    ``at_start`` leaves out the bodies of functions: what happens when the module itself is imported.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            assert node.module is not None
            yield node.module
            # "from scaling.data import cache" names a module, "from scaling.config import X" does not.
            yield from (f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in MODULES)
        elif isinstance(node, ast.If) and is_type_checking(node):
            yield from imports(node.orelse, at_start)
        elif not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and at_start):
            inside = list(ast.iter_child_nodes(node))
            for part in inside:
                if isinstance(part, ast.ExceptHandler | ast.match_case):
                    inside += part.body
            yield from imports([part for part in inside if isinstance(part, ast.stmt)], at_start)


@cache
def imported(module: str, at_start: bool) -> frozenset[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return frozenset(imports(tree.body, at_start))


def own(names: frozenset[str]) -> set[str]:
    return {n for n in names if n.partition(".")[0] in HOUSES}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("sweeps")])
def test_sweeps_use_config_flops_and_records_only(module: str) -> None:
    names = imported(module, at_start=False)
    assert {n for n in own(names) if not n.startswith("sweeps")} <= OPEN_TO_SWEEPS
    assert not {n for n in names if n.partition(".")[0] in ("torch", "accelerate")}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("analysis")])
def test_analysis_uses_records_only_and_never_torch(module: str) -> None:
    names = imported(module, at_start=False)
    assert {n for n in own(names) if not n.startswith("analysis")} <= OPEN_TO_ANALYSIS
    assert not {n for n in names if n.partition(".")[0] in ("torch", "accelerate", "safetensors")}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("scaling")])
def test_scaling_knows_neither_sweeps_nor_analysis(module: str) -> None:
    assert {n for n in own(imported(module, at_start=False)) if not n.startswith("scaling")} == set()


def test_configurations_are_imported_from_one_place() -> None:
    """Those of images and tokenizers stand behind ``scaling.config``; their dataclasses have one address."""
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in BEHIND_CONFIG:
                names = {alias.name for alias in node.names if alias.name.endswith("Config")}
                assert not names or module == "scaling.config", module


def test_no_import_circles() -> None:
    """Counting imports inside functions too: a circle hidden in a function is one all the same."""
    graph = {m: own(imported(m, at_start=False)) & MODULES.keys() - {m} for m in MODULES}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for needed in sorted(graph[module]):
                visit(needed, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_these_modules_reach_no_torch_at_start(module: str) -> None:
    seen, left = set[str](), {module}
    while left:
        current = left.pop()
        seen.add(current)
        names = imported(current, at_start=True)
        assert not {n for n in names if n.partition(".")[0] == "torch"}, current
        left |= (own(names) & MODULES.keys()) - seen


@pytest.mark.parametrize(
    "module", ["sweeps.commands", "run_sweep", "analysis.report", "scaling.data.sources"]
)
def test_importing_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["scaling.sample_command", "scaling.data.encode", "scaling.trainer"])
def test_importing_brings_no_compiler(module: str) -> None:
    """A second of every start; what trains meets it in torch's optimisers all the same."""
    code = f"import sys, {module}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("probe", "job"),
    [
        ("scaling.probes.run", "scaling.trainer"),
        ("scaling.probes.tokenizer", "scaling.tokenizer.training"),
        ("scaling.probes.tokens", "scaling.data.encode"),
    ],
)
def test_a_probe_imports_what_its_job_does(probe: str, job: str) -> None:
    """A job's start is told by its probe's: what one imports besides is time that the other does not take."""

    def reached(module: str) -> set[str]:
        seen, left = set[str](), {module}
        while left:
            current = left.pop()
            seen.add(current)
            left |= (own(imported(current, at_start=False)) & MODULES.keys()) - seen
        return seen

    beside = reached(probe) - reached(job)
    assert {m for m in beside if not m.startswith("scaling.probes.")} <= {"scaling.clock"}


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    tree = ast.parse(
        "import a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b\n"
        "try:\n    import c\nexcept ImportError:\n    import d\ndef f():\n    if 1:\n        import e\n"
        "class C:\n    import g\n    def m(self):\n        import h\n"
    )
    assert set(imports(tree.body, at_start=True)) == {"a", "typing", "c", "d", "g"}
    assert set(imports(tree.body, at_start=False)) == {"a", "typing", "c", "d", "e", "g", "h"}
