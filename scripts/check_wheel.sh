#!/usr/bin/env bash
# The built wheel as a stranger meets it: an empty environment, an empty folder, a corpus and a configuration of their own.
#
#   scripts/check_wheel.sh WHEEL
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -eq 1 && -f "$1" ]] || {
  echo "usage: scripts/check_wheel.sh WHEEL (make wheel builds one)" >&2
  exit 2
}
wheel="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
fail() {
  echo "check_wheel: $*" >&2
  exit 1
}

# Nothing of the checkout may help: not its folder on the path, not its working directory.
unset PYTHONPATH VIRTUAL_ENV
"${PYTHON:-python3}" -m venv "$folder/environment"
bin="$folder/environment/bin"
"$bin/python" -m pip --disable-pip-version-check install --quiet -c "$repository/constraints.txt" "$wheel"
"$bin/python" -m pip check
mkdir "$folder/work"
cd "$folder/work"

site="$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
for name in commands configs tests scripts; do
  [[ ! -e "$site/$name" ]] || fail "the wheel puts a package '$name' into site-packages"
done
[[ -f "$site/psannlm/py.typed" ]] || fail "py.typed is missing: type checkers will not read the package"

"$bin/psannlm" --help >/dev/null
"$bin/psannlm" --version
"$bin/python" -m psannlm --help >/dev/null
"$bin/python" -m psann.lm.train.cli --help >/dev/null
"$bin/python" -c 'from psann.lm import psannLM, psannLMDataPrep; import psannlm; assert psannLM is psannlm.psannLM'

for number in $(seq 40); do
  echo "On day $number the tide came in, and the harbour counted $((number * 7)) boats behind the wall."
done >harbour.txt
cat >own.yaml <<'YAML'
model: {base: waveresnet, d_model: 32, n_layers: 2, n_heads: 2}
data:
  sources: [{path: harbour.txt, per_line: true}]
  vocab_size: 300
  max_length: 32
  val_split: 0.1
train: {max_steps: 5, batch_tokens: 256, checkpoint_dir: runs/own}
YAML
# Two threads would only wait for each other on a model this small.
export OMP_NUM_THREADS=1
"$bin/psannlm" train own.yaml
for path in runs/own/{metrics.jsonl,loss_curve.png,latest}; do
  [[ -s "$path" ]] || fail "$path is missing or empty"
done
"$bin/psannlm" generate --prompt "On day" --max-new-tokens 20 --seed 1 >sample.txt
grep -q "^On day" sample.txt || fail "generate did not continue its prompt"
"$bin/psannlm" report --out page
[[ -s page/report.html ]] || fail "report wrote no page"
echo "check_wheel: $(basename "$wheel") works in an empty environment"
