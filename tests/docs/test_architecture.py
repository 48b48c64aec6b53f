"""The house rules that a test can hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "disagg"
# Lowest first. A file may import from its own level or from a lower one.
LEVELS = [
    {"errors", "clock", "request", "record", "config", "text", "garbage"},
    {"cache", "workload"},
    {"model", "transfer"},
    {"engine"},
    {"cluster"},
    {"measure", "llm", "server", "sim", "testing"},
    {"cli", "__main__", "__init__"},
]
PURE = [
    "errors.py",
    "clock.py",
    "request.py",
    "record.py",
    "config.py",
    "text.py",
    "cache/pages.py",
    "cache/prefix.py",
    "engine/batch.py",
    "engine/engine.py",
    "engine/scheduler.py",
    "cluster/handoff_prefill.py",
    "cluster/handoff_decode.py",
    "cluster/messages.py",
    "cluster/router.py",
    "cluster/policies.py",
    "cluster/prefix_map.py",
    "cluster/speeds.py",
    "cluster/status.py",
    "cluster/ledger.py",
    "cluster/receiving.py",
    "cluster/conserve.py",
    "model/spec.py",
    "transfer/base.py",
    "transfer/layout.py",
    "workload/arrivals.py",
    "measure/metrics.py",
    "measure/stats.py",
    "measure/verdict.py",
    "measure/guards.py",
    "measure/summary.py",
    "measure/stages.py",
    "measure/sentences.py",
    "workload/lengths.py",
    "workload/traces.py",
    "workload/workload.py",
]
DOCUMENTS = ("docs/tour.md", "docs/handoff.md", "docs/routing.md", "docs/serve.md")
IMPURE = {"torch", "socket", "zmq", "time"}


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions; not what only a type checker reads."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def level(name: str) -> int:
    return next(rank for rank, names in enumerate(LEVELS) if name in names)


def test_imports_point_down():
    """No file imports from a package above its own."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE)
        own = relative.parts[0].removesuffix(".py")
        for module in imports(path):
            if module.startswith("disagg."):
                used = module.split(".")[1]
                if level(used) > level(own):
                    wrong.append(f"{relative} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("name", PURE)
def test_pure_files_stay_pure(name):
    """What decides imports neither torch, nor sockets, nor time (clock.py alone may ask for the time)."""
    used = {module.split(".")[0] for module in imports(SOURCE / name)}
    allowed = {"time"} if name == "clock.py" else set()
    assert used & IMPURE <= allowed


def test_importing_the_package_imports_nothing_heavy():
    """`import disagg` costs nothing: names resolve on first use."""
    code = "import sys, disagg; print([m for m in ('torch', 'zmq', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exported_names_exist_and_are_sorted():
    """`__all__` is complete, sorted as ruff sorts it, and every name resolves."""
    import disagg

    for name in disagg.__all__:
        assert getattr(disagg, name).__name__ == name


def test_every_path_the_documents_name_exists():
    """A reader who follows the README, the tour or CONTRIBUTING to a file finds it."""
    root = SOURCE.parents[1]
    homes = (root, SOURCE, root / "docs", root / "tests" / "unit")
    missing = []
    for document in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", *DOCUMENTS):
        text = (root / document).read_text()
        for name in re.findall(r"`([\w./-]+\.(?:py|md|html|sh|json))`|\]\(([\w./-]+)\)", text):
            path = (name[0] or name[1]).split("#")[0]
            generated = path in ("report.html", "summary.json", "records.jsonl")
            url = path.startswith("/")
            if not generated and not url and not any((home / path).exists() for home in homes):
                missing.append(f"{document}: {path}")
    assert missing == []


def test_make_bench_needs_no_gpu():
    """On a machine without one `make bench` must not stop at a script that needs it, and leaves out no other."""
    root = SOURCE.parents[1]
    recipe = (root / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    chosen = set(root.glob(re.search(r"for script in (\S+);", recipe)[1]))
    assert chosen == {path for path in root.glob("bench/*.py") if not path.name.startswith("gpu_")}


def test_the_tour_shows_every_package():
    """Whoever looks for the place of something finds each folder of the source in the picture."""
    picture = (SOURCE.parents[1] / "docs" / "tour.md").read_text().split("## What goes where")[1].split("```")[1]
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert packages - set(picture.split()) == set()


def test_files_stay_small():
    """A file that outgrows one screenful of ideas is split: 300 lines is the aim, 400 the limit."""
    too_long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert too_long == {}


def test_every_test_states_its_rule():
    """A test without a docstring does not say what it guards."""
    silent = []
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        tests = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        tests = [node for node in tests if node.name.startswith("test_")]
        silent += [f"{path.name}::{node.name}" for node in tests if not ast.get_docstring(node)]
    assert silent == []
