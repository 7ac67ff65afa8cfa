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
    *("run_ares.py", "main.py", "run_mm_cot_rl.py", "run_mm_cot_lora.py", "haiku.py"),
    "haiku_for_correction_feedback.py",
    *("preprocessing_for_correction_feedback.py", "extract_features.py", "extract_caption.py"),
    *(f"preprocessing_after_RL/{name}.py" for name in ("processing_sentence_level_feedback", "remove_sentence")),
    *(
        f"tools/{name}.py"
        for name in (
            "prepare_data",
            "doctor",
            "predict",
            "results",
            "compare",
            "win_rate",
            "report",
            "train_reward_model",
        )
    ),
    *(f"demo/{name}.py" for name in ("make_data", "make_model", "experiments", "distill")),
]
# A file or package imports only from lower floors, or from its own package.
FLOORS = [
    ["ares"],
    ["model", "utils_prompt", "utils_evaluate", "vision"],
    ["teacher", "utils_data"],
    ["rl", "sft", "pipeline"],
    ["preprocessing_after_RL", "tools", "demo", "benchmarks", *(s[:-3] for s in SCRIPTS if "/" not in s)],
]
FLOOR = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
TOP_LEVEL = {
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "requirements.txt", "pyproject.toml", ".gitignore"),
    *("run_demo.sh", "run_tests.sh", "setup_venv.sh", ".ci", "configs", "docs", "tests"),
    *(f"{name}.py" if (ROOT / f"{name}.py").exists() else name for name in FLOOR),
}
NEEDS_TORCH = {f"ares/{name}.py" for name in ("checkpoints", "decoding", "devices", "head", "layers")}
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


def dotted(file: Path) -> str:
    """The module name of a file of the repository."""
    return str(file.relative_to(ROOT)).removesuffix(".py").replace("/", ".")


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
        own = unit_of(dotted(file))
        needs[own] |= {unit_of(name) for name, _ in imported(file)} & set(FLOOR) - {own}
    return needs


def test_the_listed_files_are_all():
    assert {unit_of(dotted(file)) for file in product_files()} == set(FLOOR)
    assert {name.partition("/")[0] for name in tracked()} <= TOP_LEVEL
    assert len([name for name in tracked() if name.endswith(".py") and "/" not in name]) <= 15


def test_imports_point_down_without_a_cycle():
    modules = {dotted(file): file for file in product_files()}
    up, needs = [], {}
    for module, file in modules.items():
        for name, line in imported(file):
            own, other = unit_of(module), unit_of(name)
            if other == "tests" or (other in FLOOR and other != own and FLOOR[other] >= FLOOR[own]):
                up.append(f"{module}:{line} (floor {FLOOR[own]}) imports {name}")
        direct = {one for one, _ in imported(file)}
        needs[module] = {other for other in modules if any(f"{one}.".startswith(f"{other}.") for one in direct)}
        needs[module] -= {module, *(other for other in needs[module] if modules[other].name == "__init__.py")}
    assert not up, "\n".join(up)
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, others in needs.items() if name not in done and others <= done}
        assert ready, f"cycle among {sorted(set(needs) - done)}"
        done |= ready


def run_without(heavy: str, lines: str) -> None:
    """Run Python code at the repository's root in which importing the packages `heavy` fails."""
    code = f"import runpy, sys\nfor heavy in {heavy.split()!r}: sys.modules[heavy] = None\n{lines}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_teacher_side_loads_without_torch():
    """The Teacher's machine may have no torch: one process imports every such file with torch blocked."""
    names = [name for name in NO_TORCH if name not in NEEDS_TORCH]
    run_without("torch transformers", f"for name in {names!r}: runpy.run_path(name, run_name='imported')")


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


def test_help_needs_no_heavy_package():
    """`--help` answers at once: neither torch nor transformers is imported for it."""
    code = (
        "import contextlib, io, pathlib\n"
        f"for name in {SCRIPTS!r}:\n"
        "    out, sys.argv = io.StringIO(), [name, '--help']\n"
        "    sys.path[0] = str(pathlib.Path(name).parent)\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(out): runpy.run_path(name, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, name\n"
        "    assert 'usage:' in out.getvalue(), name\n"
    )
    run_without("torch transformers datasets anthropic openai", code)


def test_shell_scripts_parse():
    for script in ("run_demo.sh", "run_tests.sh", "setup_venv.sh", ".ci/run"):
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
