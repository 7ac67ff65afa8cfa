#!/usr/bin/env bash
# Set-up, lint and tests.
#   bash run_tests.sh [pytest options, such as: -k sentences -x]      bash run_tests.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case " $* " in *" --help "* | *" -h "*)
    cat <<'TEXT'
usage: bash run_tests.sh [pytest options]

Makes .venv from requirements.txt (once), runs ruff, then pytest in two processes with the options given.
Useful options: -k WORDS (tests whose names match), -x (stop at the first failure), -m "not slow", --lint-only,
-n 8 (more processes), -n 0 (one process: live output with -s, a debugger with --pdb).
Real data is looked for in ../shared ($ARES_SHARED overrides); its tests are skipped where it is absent,
and fail under ARES_REQUIRE_SHARED=1.
TEXT
    exit 0 ;;
esac
. ./setup_venv.sh
setup_venv
echo "lint: ruff check, ruff format --check"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
[ "${1:-}" = "--lint-only" ] && exit 0
echo "tests: pytest $*"
# the tests of one file stay in one process: they share trained models
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
