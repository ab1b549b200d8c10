#!/usr/bin/env bash
# End-to-end smoke test and tutorial: tokenizer, training, generation and evaluation on a CPU in under two minutes.
#
#   scripts/smoke.sh            works in a temporary folder and removes it
#   scripts/smoke.sh FOLDER     works in FOLDER, which must be empty or absent, and keeps the results
#
# As a tutorial, read it from top to bottom and type the lines that start with psannlm; the lines between them check the
# results. The model is far too small to write English; every part is real.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ $# -gt 0 ]]; then
  mkdir -p "$1"
  folder="$(cd "$1" && pwd)"
else
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
fi
if [[ -n "$(ls -A "$folder")" ]]; then
  echo "smoke: $folder is not empty; name a new folder" >&2
  exit 2
fi
# The environment that `make` sets up comes first, so that no other psannlm on the PATH is used by mistake.
if [[ -x "$repository/.venv/bin/psannlm" ]]; then
  PATH="$repository/.venv/bin:$PATH"
fi
cd "$folder"
# A model this small is not faster with a second thread, and much slower when the machine is busy.
export OMP_NUM_THREADS=1

say() { printf '\n--- %s\n' "$*"; }
fail() {
  echo "smoke: $*" >&2
  exit 1
}
there() {
  for path in "$@"; do
    [[ -s "$path" ]] || fail "$path is missing or empty"
  done
}
# exits CODE COMMAND...: the command must end with exactly this code.
exits() {
  local wanted="$1" code=0
  shift
  "$@" || code=$?
  [[ $code -eq $wanted ]] || fail "'$*' ended with $code instead of $wanted"
}

say "A corpus: a dozen lines of English, a document each."
cp "$repository/examples/lm/sample_texts.txt" texts.txt
cp "$repository/configs/smoke.yaml" smoke.yaml
sources='data.sources=[{path: texts.txt, per_line: true}]'

say "A tokenizer: fit one, then look at what it makes of a text it has never seen."
psannlm tokenize texts.txt --per-line --vocab-size 320 --out tokenizer.model
there tokenizer.model tokenizer.model.card.json
psannlm tokenize --model tokenizer.model --text "Waves, naïve and fine."

say "A corpus of any size: shards on disk that training maps into memory. Done once, it is not done again."
shards=(texts.txt --per-line --tokenizer tokenizer.model --out shards --val-split 0.2)
psannlm prep "${shards[@]}"
there shards/{manifest.json,tokenizer.model,train_00000.safetensors,validation_00000.safetensors}
psannlm prep "${shards[@]}" >prepared.txt
grep -q "prepared already" prepared.txt || fail "a finished folder was prepared again"

say "What a run would be, before it starts: configuration, sizes, memory."
psannlm train smoke.yaml --set "$sources" --dry-run
[[ ! -e runs ]] || fail "--dry-run wrote something"

say "Train: twenty steps. Any key of the configuration can be set on the command line."
psannlm train smoke.yaml --set "$sources"
there runs/smoke/{config.yaml,system.json,metrics.jsonl,loss_curve.png,latest,best}
there runs/smoke/step_00000020/{model.safetensors,trainer.json}

say "Train on the shards: the same configuration, and the tokenizer that made them."
psannlm train smoke.yaml --set 'data.sources=[shards]' --set data.tokenizer=auto --set data.val_split=0 \
  --set train.checkpoint_dir=runs/shards --set train.max_steps=4
there runs/shards/step_00000004/model.safetensors

say "Stop a run in the middle (Ctrl-C would do the same): it finishes its step, saves, and exits with 130."
long=(smoke.yaml --set "$sources" --set train.max_steps=200 --set train.log_interval_steps=20
  --set train.checkpoint_dir=runs/long)
psannlm train "${long[@]}" &
training=$!
until [[ -s runs/long/latest ]]; do
  kill -0 "$training" 2>/dev/null || fail "training ended before its first checkpoint"
  sleep 0.02
done
kill -TERM "$training"
exits 130 wait "$training"
there runs/long/latest
stopped_at="$(cat runs/long/latest)"
[[ ! -e runs/long/step_00000200 ]] || fail "the run was not interrupted"

say "The same command resumes there ($stopped_at) and finishes."
psannlm train "${long[@]}"
there runs/long/step_00000200/model.safetensors

say "Generate: with no --checkpoint, the newest run's best one speaks. The same seed gives the same text."
psannlm generate --prompt "The sea" --max-new-tokens 40 --seed 7 | tee once.txt
psannlm generate --prompt "The sea" --max-new-tokens 40 --seed 7 >again.txt
there once.txt
cmp once.txt again.txt

say "Evaluate: loss per token, perplexity, bits per byte, over all of a text."
psannlm eval texts.txt --per-line --checkpoint runs/smoke/step_00000020 --out scores
there scores/{metrics.json,system.json}

say "Compare: two models of equal size, one run each. A real study has seeds and learning rates to choose from."
cat >plan.yaml <<'YAML'
base: smoke.yaml
budget: {tokens: 1500}
baseline: swiglu
overrides: {data: {sources: [{path: texts.txt, per_line: true}]}}
variants:
  swiglu: {model: {base: transformer, mlp: swiglu}}
  waveresnet: {model: {base: waveresnet}}
YAML
psannlm compare plan.yaml --dry-run
[[ ! -e runs/plan ]] || fail "--dry-run wrote something"
psannlm compare plan.yaml --jobs 2 --out study
there study/{metrics.json,system.json,table.txt,differences.png,loss_by_tokens.png,loss_by_time.png}
psannlm compare plan.yaml --out study # everything is done: only the table is made again

say "Report: everything so far on one page that opens anywhere; and two runs side by side."
psannlm report --out report
there report/{report.html,report.md,throughput.csv,memory.json,metrics.csv,metrics.json,loss_curve.png,system.json}
psannlm report --compare runs/smoke runs/long --out sidebyside
there sidebyside/{report.html,comparison.json}

say "What goes wrong says so: 2 for a misspelt key, 1 where there is no model yet."
exits 2 psannlm train smoke.yaml --set "$sources" --set train.learning_rate=1
mkdir nothing
exits 1 psannlm generate --prompt "The sea" --runs nothing

say "smoke: all done in ${SECONDS} s"
