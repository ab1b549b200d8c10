#!/usr/bin/env bash
# The study of docs/quality.md: text, tokenizer and shards outside the repository, then the plans, one after another.
#
#   scripts/study.sh [PLAN.yaml ...]         default: every configs/study_*_1m.yaml
#
# Everything that is there already is used as it is, and runs go on where they stopped. JOBS runs are made at a time
# (default: one for each core); CORPORA names another place for the text than ../psannlm-corpora.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpora="${CORPORA:-../psannlm-corpora}"
psannlm="${PSANNLM:-.venv/bin/psannlm}"
[[ -x "$psannlm" ]] || {
  echo "study: $psannlm is not there; make .venv first (make demo), or name another one in PSANNLM" >&2
  exit 1
}
plans=("$@")
[[ ${#plans[@]} -gt 0 ]] || plans=(configs/study_*_1m.yaml)
for plan in "${plans[@]}"; do
  [[ -f "$plan" ]] || { echo "study: there is no plan $plan" >&2; exit 2; }
done

scripts/fetch_docs_corpus.sh "$corpora"
texts=("$corpora/python3.11-doc" "$corpora/linux-doc")
[[ -f "$corpora/docs-2048.model" ]] ||
  "$psannlm" tokenize "${texts[@]}" --vocab-size 2048 --out "$corpora/docs-2048.model"
"$psannlm" prep "${texts[@]}" --tokenizer "$corpora/docs-2048.model" --val-split 0.015 --out "$corpora/docs-2048"

jobs="${JOBS:-$(nproc)}"
for plan in "${plans[@]}"; do
  "$psannlm" compare "$plan" --jobs "$jobs"
done
