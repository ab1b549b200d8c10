#!/usr/bin/env bash
# Both test suites on a GPU, one after the other, each with its folder under reports/tests/:
#
#   scripts/run_cuda_suite.sh [options of the two scripts, such as --device cpu]
#
# The tests marked gpu come first, because they are short. Exit code: 0 if both suites pass, else 1.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [[ -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
stamp="$(date -u +%Y%m%d_%H%M%S)"
failed=0
"$python" scripts/run_gpu_tests.py --out "reports/tests/${stamp}_gpu" "$@" || failed=1
"$python" scripts/run_cuda_tests.py --out "reports/tests/${stamp}_cuda" "$@" || failed=1
exit "$failed"
