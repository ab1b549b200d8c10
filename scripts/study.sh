#!/usr/bin/env bash
# The study of docs/research/results.md: text, tokenizer and shards outside the repository, then the plans, one after another.
#
#   scripts/study.sh [PLAN.yaml ...]         default: study_*_[125]m.yaml and study_task_*.yaml of configs/studies/
#
# Existing files are used as they are, and stopped runs are resumed. JOBS runs are trained at the same time. By default
# that is one for each GPU where torch sees any, else one for each core.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpora=../psannlm-corpora
psannlm="${PSANNLM:-.venv/bin/psannlm}"
[[ -x "$psannlm" ]] || {
  echo "study: $psannlm does not exist; create .venv first (make demo), or set PSANNLM to another one" >&2
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
  local out="$corpora/$1" val_split="$2"
  shift 2
  [[ -f "$out.model" ]] || "$psannlm" tokenize "$@" --vocab-size 2048 --out "$out.model"
  "$psannlm" prep "$@" --tokenizer "$out.model" --val-split "$val_split" --out "$out"
}

# The algorithmic task of a plan, or nothing.
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

options=()
if [[ -n "${JOBS:-}" ]]; then
  options=(--jobs "$JOBS")
elif [[ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" == 0 ]]; then
  options=(--jobs "$(nproc)")
fi
for plan in "${plans[@]}"; do
  "$psannlm" compare "$plan" ${options[@]+"${options[@]}"}
done
