# Makes .venv with the packages of requirements.txt, once: source setup_venv.sh && setup_venv (as run_demo.sh does)
#
# A stamp in .venv holds the Python version and the hash of requirements.txt: while both are unchanged there is nothing
# to do. $PYTHON names the interpreter to start from (3.11 or newer; default python3). About 3.5 minutes and 6.5 GB.

python_version() { "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null; }

setup_venv() {
    local python="${PYTHON:-python3}" stamp=.venv/.ares-ready version wanted
    version="$(python_version "$python")" ||
        { echo "setup: error: '$python' does not run; set PYTHON to Python 3.11 or newer" >&2; return 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "setup: error: Python $version is too old; set PYTHON to Python 3.11 or newer" >&2; return 2; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        { echo "setup: error: '$python' has no venv module (Debian: apt-get install python3-venv)" >&2; return 2; }
    wanted="$version $(sha256sum requirements.txt | cut -d' ' -f1)"
    if [ "$(python_version .venv/bin/python)" = "$version" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "setup: .venv is ready"
        return 0
    fi
    echo "setup: installing requirements.txt into .venv (some minutes, about 6.5 GB) ..."
    # an interrupted installation is continued; another Python's .venv, or one without pip, is made anew
    if [ "$(python_version .venv/bin/python)" != "$version" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear .venv || return 1
    fi
    .venv/bin/python -m pip install --quiet --upgrade pip || return 1
    .venv/bin/python -m pip install --quiet -r requirements.txt ||
        { echo "setup: error: the installation failed (see above)" >&2; return 1; }
    echo "$wanted" >"$stamp"
    echo "setup: done"
}
