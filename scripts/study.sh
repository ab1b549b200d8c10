#!/usr/bin/env bash
# The study of docs/research/results.md: text, tokenizer and shards outside the repository, then the plans, one after another.
#
#   scripts/study.sh [PLAN.yaml ...]         default: study_*_[125]m.yaml and study_task_*.yaml of configs/studies/
#
# Everything that is there already is used as it is, and runs go on where they stopped. JOBS runs are made at a time
# (default: one for each core).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpora=../psannlm-corpora
psannlm="${PSANNLM:-.venv/bin/psannlm}"
[[ -x "$psannlm" ]] || {
  echo "study: $psannlm is not there; make .venv first (make demo), or name another one in PSANNLM" >&2
  exit 1
}
plans=("$@")
[[ ${#plans[@]} -gt 0 ]] || plans=(configs/studies/study_*_[125]m.yaml configs/studies/study_task_*.yaml)
for plan in "${plans[@]}"; do
  [[ -f "$plan" ]] || { echo "study: there is no plan $plan" >&2; exit 2; }
done

python="$(dirname "$psannlm")/python"

# make_folder NAME VAL_SPLIT TEXT ...: a tokenizer of 2,048 entries and token shards.
make_folder() {
  local out="$corpora/$1" share="$2"
  shift 2
  [[ -f "$out.model" ]] || "$psannlm" tokenize "$@" --vocab-size 2048 --out "$out.model"
  "$psannlm" prep "$@" --tokenizer "$out.model" --val-split "$share" --out "$out"
}

# The counting task that a plan reads, or nothing.
task_of() {
  sed -n 's/^answers: *//p' "$1"
}

for plan in "${plans[@]}"; do
  if task="$(task_of "$plan")" && [[ -n "$task" ]]; then
    "$python" scripts/make_task.py "$task" --out "$corpora/tasks/$task.txt" --if-missing
  elif grep -q "$corpora/books-2048" "$plan"; then
    "$python" scripts/make_tiny_corpus.py --bytes 20000000 --out "$corpora/books.txt" --if-missing
    make_folder books-2048 0.02 --per-line "$corpora/books.txt"
  elif grep -q '^base: study_base.yaml' "$plan"; then
    scripts/fetch_docs_corpus.sh "$corpora"
    make_folder docs-2048 0.015 "$corpora/python3.11-doc" "$corpora/linux-doc"
  fi
done

jobs="${JOBS:-$(nproc)}"
for plan in "${plans[@]}"; do
  "$psannlm" compare "$plan" --jobs "$jobs"
done
