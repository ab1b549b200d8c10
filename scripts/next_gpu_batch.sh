#!/usr/bin/env bash
# All GPU measurements in one batch, each step on its own:
#
#   scripts/next_gpu_batch.sh                     on a pod, from the repository's own environment
#   scripts/next_gpu_batch.sh --dry-run [FOLDER]  the same on a CPU at small sizes, in a temporary folder or in FOLDER
#                                                 (also under its former name, --rehearse)
#
# 1. psannlm gpu-validate                 -> OUT_DIR    (reports/gpu/<time>)
# 2. bench-train at three batch sizes     -> reports/throughput/<time>_*
# 3. peak memory, with and without activation checkpointing, likewise
# 4. a tiny corpus, if it is missing      -> TINY_DATA  (datasets/lm/tiny_books.txt)
# 5. training on it, by TINY_CONFIG       -> runs/tiny_<time>   (examples/lm/configs/tiny_corpus_benchmark.yaml),
#    one epoch, or the fraction of it that TINY_BUDGET (10m) allows
# 6. psannlm report                       -> BENCH_OUT  (reports/benchmarks/<time>)
#
# A step that fails is recorded in OUT_DIR/steps.txt and does not stop the others. Exit code: 0 all steps passed; 3 only
# limits were missed; 1 a step failed; 130 interrupted.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
device=cuda
keep=yes
folder="$repository"
case "${1:-}" in
  "") ;;
  --dry-run | --rehearse)
    device=cpu
    if [[ $# -gt 1 ]]; then
      mkdir -p "$2"
      folder="$(cd "$2" && pwd)"
    else
      folder="$(mktemp -d)"
      keep=no
    fi
    # A model this small is not faster with a second thread.
    export OMP_NUM_THREADS=1
    ;;
  *)
    echo "usage: scripts/next_gpu_batch.sh [--dry-run [FOLDER]]" >&2
    exit 2
    ;;
esac
# The environment that `make` sets up comes first, so that no other psannlm on the PATH is used by mistake.
if [[ -x "$repository/.venv/bin/psannlm" ]]; then
  PATH="$repository/.venv/bin:$PATH"
fi
command -v psannlm >/dev/null || {
  echo "next_gpu_batch: there is no psannlm on the PATH; run 'make test' once, or activate its environment" >&2
  exit 1
}
cd "$folder"

stamp="$(date -u +%Y%m%d_%H%M%S)"
OUT_DIR="${OUT_DIR:-reports/gpu/$stamp}"
BENCH_OUT="${BENCH_OUT:-reports/benchmarks/$stamp}"
TINY_CONFIG="${TINY_CONFIG:-$repository/examples/lm/configs/tiny_corpus_benchmark.yaml}"
TINY_DATA="${TINY_DATA:-datasets/lm/tiny_books.txt}"
TINY_BUDGET="${TINY_BUDGET:-10m}"
mkdir -p "$OUT_DIR"

if [[ $device == cuda ]]; then
  batches=(65536 131072 262144)
  model=(--d-model 256 --n-layers 4 --n-heads 4 --vocab-size 32000 --seq-len 1024 --compile --device cuda)
  corpus_bytes=50000000
  training=()
else
  batches=(512) # the loop is the same for one
  model=(--d-model 32 --n-layers 2 --n-heads 2 --vocab-size 256 --seq-len 32 --steps 1 --repeats 1 --device cpu)
  corpus_bytes=200000
  training=(--set model.d_model=32 --set model.n_layers=2 --set model.n_heads=2 --set data.max_length=64
    --set train.max_steps=20 --set train.warmup_steps=2 --set train.batch_tokens=512 --set train.eval_interval_steps=10)
fi

failed=0
missed=0
finish() {
  local code=$?
  if [[ $keep == no ]]; then
    rm -rf "$folder"
  fi
  exit "$code"
}
trap finish EXIT
trap 'echo "next_gpu_batch: interrupted" >&2; exit 130' INT TERM

# step NAME COMMAND...: run the command, record its exit code, continue.
step() {
  local name="$1" code=0 began=$SECONDS verdict
  shift
  printf '\n--- %s\n' "$name"
  "$@" || code=$?
  case $code in
    0) verdict="ok" ;;
    3) verdict="limit missed" && missed=1 ;;
    130)
      printf '%-28s interrupted\n' "$name" >>"$OUT_DIR/steps.txt"
      exit 130
      ;;
    *) verdict="FAILED" && failed=1 ;;
  esac
  printf '%-28s %-13s exit %-4s %6s s\n' "$name" "$verdict" "$code" "$((SECONDS - began))" | tee -a "$OUT_DIR/steps.txt"
}

step "gpu-validate" psannlm gpu-validate --device "$device" --out "$OUT_DIR"
for base in respsann waveresnet transformer; do
  also=()
  if [[ $base != transformer ]]; then
    also=(--also gelu)
  fi
  for batch in "${batches[@]}"; do
    step "throughput $base $batch" psannlm bench-train --base "$base" --batch-tokens "$batch" "${model[@]}" \
      "${also[@]+"${also[@]}"}" --no-memory --out "reports/throughput/${stamp}_${base}_$batch"
  done
done
step "memory" psannlm bench-train --base waveresnet --batch-tokens "${batches[0]}" "${model[@]}" \
  --also grad-checkpoint --out "reports/throughput/${stamp}_memory"
step "tiny corpus" python "$repository/scripts/make_tiny_corpus.py" --out "$TINY_DATA" --bytes "$corpus_bytes" --if-missing
step "tiny training" psannlm train "$TINY_CONFIG" --time-budget "$TINY_BUDGET" --set "data.sources=[{path: '$TINY_DATA', per_line: true}]" \
  --set "train.checkpoint_dir=runs/tiny_$stamp" --set "train.device=$device" "${training[@]+"${training[@]}"}"
step "report" psannlm report --since "$stamp" --runs "runs/tiny_$stamp" --out "$BENCH_OUT"

printf '\n--- %s\n' "every step, in $SECONDS s"
cat "$OUT_DIR/steps.txt"
if [[ $keep == yes ]]; then
  printf '\nCopy from the machine: %s/{%s,%s,reports/throughput,runs/tiny_%s}\n' "$folder" "$OUT_DIR" "$BENCH_OUT" "$stamp"
fi
if [[ $failed -ne 0 ]]; then
  exit 1
fi
if [[ $missed -ne 0 ]]; then
  exit 3
fi
