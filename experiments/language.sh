#!/usr/bin/env bash
# What do language models gain from one another? (docs/results/language.md)
#     experiments/language.sh DATA runs/language
# DATA has shakespeare/train.jsonl and test.jsonl (speaker, text), and gsm8k/train.jsonl and
# test.jsonl (question, answer). Goes on where it stopped.
set -euo pipefail
data=${1:?usage: experiments/language.sh DATA OUT} out=${2:?usage: experiments/language.sh DATA OUT}
plait=${PLAIT:-plait}
mkdir -p "$out"

# The eight roles that speak most; eight test lines of each.
python3 - "$data/shakespeare" "$out" <<'PY'
import collections, json, pathlib, sys
data, out = map(pathlib.Path, sys.argv[1:])
read = lambda part: [json.loads(line) for line in (data / f"{part}.jsonl").open()]
train, test, seen = read("train"), read("test"), collections.Counter()
roles = {name for name, _ in collections.Counter(r["speaker"] for r in train).most_common(8)}
kept = []
for row in test:
    if row["speaker"] in roles and seen[row["speaker"]] < 8:
        seen[row["speaker"]] += 1
        kept.append(row)
for name, rows in (("roles", [r for r in train if r["speaker"] in roles]), ("roles-test", kept)):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PY
head -32 "$data/gsm8k/test.jsonl" >"$out/gsm8k-test.jsonl"

common=(--task chat --backbone smollm2 --topology ring --methods adf,dec-lora,ffa,local --rounds 8
        --switch-every 2 --eval-every 100 --seeds 0,1 --resume)
"$plait" compare "${common[@]}" --train-file "$out/roles.jsonl" --dev-file "$out/roles-test.jsonl" \
  --text-columns text --key-column speaker --label-skew key --clients 8 --local-steps 3 \
  --batch-size 4 --max-length 64 --lr-grid 1e-3,3e-3 --out "$out/shakespeare"
"$plait" compare "${common[@]}" --train-file "$data/gsm8k/train.jsonl" \
  --dev-file "$out/gsm8k-test.jsonl" --text-columns question,answer --label-skew iid --clients 4 \
  --local-steps 2 --batch-size 2 --max-length 256 --skip-bad-rows --lr 3e-3 --out "$out/gsm8k"
