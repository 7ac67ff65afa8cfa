"""The house: imports only point down, scripts explain themselves, the shell commands hold together."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = [
    "main.py",
    "run_mm_cot_rl.py",
    "run_mm_cot_lora.py",
    "haiku.py",
    "haiku_for_correction_feedback.py",
    "preprocessing_for_correction_feedback.py",
    "win_rate.py",
    "results.py",
    "extract_features.py",
    "extract_caption.py",
    "prepare_data.py",
    "doctor.py",
    "predict.py",
    "report.py",
    "preprocessing_after_RL/processing_sentence_level_feedback.py",
    "preprocessing_after_RL/remove_sentence.py",
    "demo/run.py",
    "demo/make_data.py",
    "demo/make_tokenizer.py",
    "demo/make_model.py",
]
# the Teacher's machine may have no torch
NEEDS_TORCH = {"ppo.py", "checkpoints.py", "head.py", "t5_config.py"}
NO_TORCH = [
    *sorted(f"ares/{file.name}" for file in (ROOT / "ares").glob("*.py") if file.name not in NEEDS_TORCH),
    "utils_prompt.py",
    "report.py",
    "utils_evaluate.py",
    "win_rate.py",
    "results.py",
    "haiku.py",
    "haiku_for_correction_feedback.py",
    "preprocessing_for_correction_feedback.py",
    "preprocessing_after_RL/processing_sentence_level_feedback.py",
]


def _modules() -> dict[str, Path]:
    """Every module of the product, by dotted name."""
    folders = ("", "ares/", "preprocessing_after_RL/", "report_page/")
    files = [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]
    return {str(file.relative_to(ROOT))[:-3].replace("/", "."): file for file in files}


def _imports(file: Path) -> set[str]:
    """Top-level and function-level imports alike, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_imports_a_script():
    rooms = {room[:-3].replace("/", ".") for room in ROOMS} | {Path(room).stem for room in ROOMS}
    for name, file in _modules().items():
        assert not (_imports(file) & rooms), f"{name} imports a script"


def test_foundation_imports_nothing_above_it():
    above = {name.split(".")[0] for name in _modules()} - {"ares"}
    for file in ROOT.glob("ares/*.py"):
        up = {name.split(".")[0] for name in _imports(file)} & above
        assert not up, f"{file.name} imports {up}"


def test_walls_and_foundation_have_no_import_cycle():
    modules = _modules()
    needs = {name: (_imports(file) & set(modules)) - {name} for name, file in modules.items()}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, others in needs.items() if name not in done and others <= done}
        assert ready, f"cycle among {sorted(set(needs) - done)}"
        done |= ready


@pytest.mark.parametrize("name", NO_TORCH)
def test_teacher_side_loads_without_torch(name):
    code = (
        "import runpy, sys\n"
        "for heavy in ('torch', 'transformers'): sys.modules[heavy] = None\n"  # importing either now fails
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / name)!r}, run_name='imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ROOMS)
def test_script_explains_itself(name):
    tree = ast.parse((ROOT / name).read_text())
    docstring = ast.get_docstring(tree) or ""
    assert Path(name).name in docstring or Path(name).stem in docstring, "the module docstring has no launch line"
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"parse_args", "main"} <= functions
    done = subprocess.run([sys.executable, ROOT / name, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    # a flag without help prints nothing after its name and metavar
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            assert any(keyword.arg == "help" for keyword in node.keywords), f"{name}:{node.lineno}: a flag has no help"


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
