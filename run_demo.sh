#!/usr/bin/env bash
# Runs the whole ARES loop on a small data set that the project makes itself: no GPU, no API key, no downloads but packages.
#   bash run_demo.sh [--output demo_run] [--seed 0] [...]      bash run_demo.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case " $* " in *" --help "* | *" -h "*) exec "${PYTHON:-python3}" run_ares.py --help ;; esac
. ./setup_venv.sh
setup_venv
exec .venv/bin/python run_ares.py --config configs/demo.yaml --output demo_run "$@"
