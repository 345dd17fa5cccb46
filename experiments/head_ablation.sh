#!/usr/bin/env bash
# Which classifier head can ten clients train on a sentence encoder? (docs/results/head-ablation.md)
#     experiments/head_ablation.sh runs/head-ablation
set -euo pipefail
out=${1:?usage: experiments/head_ablation.sh OUT}
plait=${PLAIT:-plait}

run() { # label, then flags
  local label=$1
  shift
  "$plait" run --task trec --method dec-lora --label-skew dirichlet:0.5 --topology ring \
    --rounds 6 --local-steps 8 --batch-size 16 --dtype bfloat16 --eval-every 6 --eval-rows 1 \
    --out "$out/$label" "$@" >"$out/$label.log"
  python3 - "$label" "$out/$label/summary.json" <<'PY'
import json, sys
summary = json.load(open(sys.argv[2]))
print(f"| {sys.argv[1]:28} | {summary['accuracy_client_mean']:.3f} | "
      f"{summary['accuracy_client_min']:.3f} | {summary['accuracy_averaged_model']:.3f} |")
PY
}

mkdir -p "$out"
echo "| head                         | clients' mean | worst | averaged model |"
echo "|------------------------------|-------|-------|-------|"
run own-frozen                --pooling model --head frozen
run own-frozen-lr-5e-3        --pooling model --head frozen --lr 5e-3
run own-mixed                 --pooling model --head mixed
run own-mixed-head-lr-1e-3    --pooling model --head mixed --head-lr 1e-3
run mean-mixed-head-lr-1e-3   --pooling mean --head mixed --head-lr 1e-3
run mean-local                --pooling mean --head local
run mean-mixed                --pooling mean --head mixed
