#!/usr/bin/env bash
# Times all six stages against the released recipe and writes one table, benchmarks/RESULTS.md: 20 minutes on two cores.
#
#     bash benchmarks/run_all.sh --size tiny --device cpu
#     bash benchmarks/run_all.sh --size base --device cuda --profile
#
# Flags go to every benchmark (--size, --device, --repeats, --threads, --profile). Questions come from the real sample in
# ../shared or $ARES_SHARED; without it the demo's questions are used and RESULTS.md is left as it is. Without $PYTHON
# the project's .venv is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
began=$SECONDS
for stage in sft rollout ppo eval features memory; do
    echo "== $stage"
    "$python" benchmarks/bench_$stage.py "$@" --json "$results/$stage.json" 2>"$results/$stage.log" || {
        tail -n 20 "$results/$stage.log" >&2
        exit 1
    }
done
"$python" benchmarks/table.py "$results" --seconds $((SECONDS - began))
