#!/usr/bin/env bash
# One GPU, one command: is the project right, fast and small enough there? Under 9 minutes on an H100; a table last.
#
#     bash benchmarks/gpu.sh                            # OUT=gpu_out: table.md, results.jsonl, logs.txt, {stage}.json
#     DEVICE=cpu SIZE=tiny bash benchmarks/gpu.sh       # dry run: the same code, tiny work, no comparisons
#
# Afterwards `python benchmarks/table.py gpu_out --seconds N` puts the comparisons into RESULTS.md's GPU column. Needs no
# network. $PYTHON: default .venv's, else python3; $BUDGET: seconds in all. Questions are those of $ARES_SHARED or
# ../shared, else the demo's. Without nltk BLEU is a stand-in (wheels in .wheels are installed first); without rouge
# bench_eval.py compares generation alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device="${DEVICE:-cuda}" size="${SIZE:-base}" budget="${BUDGET:-520}" began=$SECONDS
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
out="${OUT:-gpu_out}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/steps.tsv "$out"/results.jsonl "$out"/logs.txt "$out"/table.md "$out"/{sft,rollout,ppo,eval,features}.json
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# step NAME SECONDS COMMAND...: output to logs.txt, status to steps.tsv; skipped without 15 seconds of the budget left
step() {
    local name="$1" most="$2" status start=$SECONDS left=$((budget - SECONDS + began)) note
    shift 2
    if [ "$left" -lt 15 ]; then
        printf '%s\tskip\t0\t\n' "$name" >>"$out/steps.tsv"
        return
    fi
    echo "== $name (after $((SECONDS - began)) s)"
    timeout -k 5 $((left < most ? left : most)) "$@" >"$scratch/$name.log" 2>&1
    status=$?
    { echo "== $name" && cat "$scratch/$name.log"; } >>"$out/logs.txt"
    note="$(grep -E '^(=+ .*(passed|failed|skipped)|.*error:|[A-Za-z.]*Error)' "$scratch/$name.log" | tail -n 1)"
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) "${note:0:110}" >>"$out/steps.tsv"
    [ "$status" = 0 ] || tail -n 8 "$scratch/$name.log"
}

if ls .wheels/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --target "$scratch/wheels" .wheels/*.whl
    export PYTHONPATH="$PYTHONPATH:$scratch/wheels"
fi
if ! has nltk; then
    mkdir -p "$scratch/stand_in/nltk/translate"
    touch "$scratch"/stand_in/nltk/{,translate/}__init__.py
    echo "def sentence_bleu(references, hypothesis, weights, **kwargs):
    same = float(references[0] == hypothesis)
    return [same] * len(weights) if isinstance(weights[0], tuple) else same" \
        >"$scratch/stand_in/nltk/translate/bleu_score.py"
    export PYTHONPATH="$PYTHONPATH:$scratch/stand_in"
fi
[ "$device" = cuda ] && nvidia-smi >>"$out/logs.txt" 2>&1

if [ "$device" = cuda ]; then # both at a time: they leave most of the GPU free
    step gpu_tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/rl tests/sft &
    step every_script 160 "$python" run_ares.py --config configs/smoke.yaml --output "$scratch/smoke" \
        --set launch.rl=python at_once=3 'forms=[QCMG-A]' &
    wait
fi
threads="$([ "$device" = cuda ] && nproc || echo 1)"
step bench_gpu 120 "$python" benchmarks/bench_gpu.py --size "$size" --device "$device" --threads "$threads" \
    --out "$out" --seconds 90
if [ "$device" = cuda ]; then
    scores="$(has rouge && echo --no_similarity || echo --no_scores)"
    for stage in ppo rollout sft eval features; do
        step "bench_$stage" 60 "$python" benchmarks/bench_$stage.py --size "$size" --device "$device" --repeats 2 \
            --json "$out/$stage.json" $([ $stage = eval ] && echo "$scores")
    done
fi
# last: what it measures was computed, while the speed of a GPU is known from nothing else
step memory 120 "$python" benchmarks/bench_gpu.py --size "$size" --device "$device" --threads "$threads" \
    --out "$out" --memory
"$python" benchmarks/table.py "$out" --seconds $((SECONDS - began)) --only_print | tee "$out/table.md"
rm -f "$out/steps.tsv" # it is in the table
echo "$((SECONDS - began)) s in all"
