"""The structure: imports only point down, the top level holds the listed files, scripts explain themselves.

python -m pytest tests/test_layout.py            # python tests/test_layout.py prints floors and imports
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPTS = [
    "main.py",
    "run_mm_cot_rl.py",
    "run_mm_cot_lora.py",
    "haiku.py",
    "haiku_for_correction_feedback.py",
    "preprocessing_for_correction_feedback.py",
    "extract_features.py",
    "extract_caption.py",
    "preprocessing_after_RL/processing_sentence_level_feedback.py",
    "preprocessing_after_RL/remove_sentence.py",
    "tools/prepare_data.py",
    "tools/doctor.py",
    "tools/predict.py",
    "tools/results.py",
    "tools/win_rate.py",
    "tools/report.py",
    "demo/run.py",
    "demo/make_data.py",
    "demo/make_model.py",
]
# A file or package imports only from lower floors, or from its own package.
FLOORS = [
    ["ares"],
    ["model", "utils_prompt", "utils_evaluate", "vision"],
    ["teacher", "utils_data"],
    ["rl", "sft"],
    ["preprocessing_after_RL", "tools", "demo", "benchmarks", *(s[:-3] for s in SCRIPTS if "/" not in s)],
]
FLOOR = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
TOP_LEVEL = {
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "requirements.txt", "pyproject.toml", ".gitignore"),
    *("run_demo.sh", "run_tests.sh", "setup_venv.sh", ".ci", "configs", "docs", "tests"),
    *(f"{name}.py" if (ROOT / f"{name}.py").exists() else name for name in FLOOR),
}
NEEDS_TORCH = {"ares/checkpoints.py", "ares/head.py", "ares/decoding.py"}
NO_TORCH = [
    *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("ares/*.py")),
    *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("teacher/*.py")),
    *("utils_prompt.py", "utils_evaluate.py", "haiku.py", "haiku_for_correction_feedback.py"),
    *("preprocessing_for_correction_feedback.py", "tools/report.py", "tools/win_rate.py", "tools/results.py"),
    *(f"preprocessing_after_RL/{name}.py" for name in ("processing_sentence_level_feedback", "remove_sentence")),
]


def tracked() -> list[str]:
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")[:-1]


def product_files() -> list[Path]:
    return [ROOT / name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")]


def unit_of(name: str) -> str:
    """The top-level file or package that a dotted module name belongs to."""
    return name.partition(".")[0]


@cache
def imported(file: Path) -> frozenset[tuple[str, int]]:
    """(dotted name, line) of every import of a file, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {(f"{node.module}.{alias.name}", node.lineno) for alias in node.names}
    return frozenset(found)


def units() -> dict[str, set[str]]:
    """Each top-level file or package -> those that it imports."""
    needs: dict[str, set[str]] = {name: set() for name in FLOOR}
    for file in product_files():
        own = unit_of(str(file.relative_to(ROOT)).removesuffix(".py").replace("/", "."))
        needs[own] |= {unit_of(name) for name, _ in imported(file)} & set(FLOOR) - {own}
    return needs


def test_every_product_file_has_a_floor():
    names = {unit_of(str(file.relative_to(ROOT)).removesuffix(".py").replace("/", ".")) for file in product_files()}
    assert names == set(FLOOR)


def test_top_level_holds_only_the_listed_files():
    assert {name.partition("/")[0] for name in tracked()} <= TOP_LEVEL
    assert len([name for name in tracked() if name.endswith(".py") and "/" not in name]) <= 15


def test_imports_point_down():
    up = []
    for file in product_files():
        where = str(file.relative_to(ROOT))
        own = unit_of(where.removesuffix(".py").replace("/", "."))
        for name, line in imported(file):
            other = unit_of(name)
            if other in FLOOR and other != own and FLOOR[other] >= FLOOR[own]:
                up.append(f"{where}:{line} imports {name} (floor {FLOOR[other]} from floor {FLOOR[own]})")
            if other == "tests":
                up.append(f"{where}:{line} imports {name}")
    assert not up, "\n".join(up)


def test_no_import_cycle_between_modules():
    modules = {str(f.relative_to(ROOT)).removesuffix(".py").replace("/", "."): f for f in product_files()}
    needs = {}
    for name, file in modules.items():
        direct = {one for one, _ in imported(file)}
        needs[name] = {other for other in modules if any(f"{one}.".startswith(f"{other}.") for one in direct)}
        needs[name] -= {name, *(other for other in needs[name] if modules[other].name == "__init__.py")}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, others in needs.items() if name not in done and others <= done}
        assert ready, f"cycle among {sorted(set(needs) - done)}"
        done |= ready


def test_teacher_side_loads_without_torch():
    """The Teacher's machine may have no torch: one process imports every such file with torch blocked."""
    names = [name for name in NO_TORCH if name not in NEEDS_TORCH]
    code = (
        "import runpy, sys\n"
        "for heavy in ('torch', 'transformers'): sys.modules[heavy] = None\n"  # importing either now fails
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {names!r}:\n"
        "    try: runpy.run_path(name, run_name='imported')\n"
        "    except ImportError as error: sys.exit(f'{name}: {error}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_explains_itself(name):
    tree = ast.parse((ROOT / name).read_text())
    docstring = ast.get_docstring(tree) or ""
    assert Path(name).name in docstring or Path(name).stem in docstring, "the module docstring has no launch line"
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "main"} <= functions
    # a flag without help prints nothing after its name and metavar
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            assert any(keyword.arg == "help" for keyword in node.keywords), f"{name}:{node.lineno}: a flag has no help"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_heavy_package(name):
    """`--help` answers at once: neither torch nor transformers is imported for it."""
    code = (
        "import runpy, sys\n"
        "for heavy in ('torch', 'transformers', 'datasets', 'anthropic'): sys.modules[heavy] = None\n"
        f"sys.argv = [{name!r}, '--help']\n"
        f"sys.path.insert(0, {str((ROOT / name).parent)!r})\n"
        f"runpy.run_path({name!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("script", ["run_demo.sh", "run_tests.sh", "setup_venv.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_setup_is_skipped_when_ready_and_refuses_an_unusable_python(tmp_path):
    call = f"cd {tmp_path} && cp {ROOT}/requirements.txt . && . {ROOT}/setup_venv.sh && "
    ready = (
        "mkdir -p .venv/bin && ln -s $(command -v python3) .venv/bin/python && "
        "wanted=\"$(python_version python3) $(sha256sum requirements.txt | cut -d' ' -f1)\" && "
        'echo "$wanted" > .venv/.ares-ready && setup_venv'
    )
    done = subprocess.run(["bash", "-c", call + ready], capture_output=True, text=True)
    assert done.returncode == 0 and "ready" in done.stdout, done.stderr
    done = subprocess.run(["bash", "-c", call + "PYTHON=no-such-python setup_venv"], capture_output=True, text=True)
    assert done.returncode == 2 and "PYTHON" in done.stderr


if __name__ == "__main__":
    for name, others in sorted(units().items(), key=lambda item: (-FLOOR[item[0]], item[0])):
        print(FLOOR[name], name, "->", " ".join(sorted(others)))
