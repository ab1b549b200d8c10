#!/usr/bin/env bash
# Real text to measure on: the reST sources of the Python and Linux manuals, out of Debian's packages.
#
#   scripts/fetch_docs_corpus.sh FOLDER [COPIES]
#
# Writes FOLDER/python3.11-doc and FOLDER/linux-doc, each with the package's version beside the text; what is there
# already is left alone. Nothing is installed. FOLDER must lie outside the repository: a corpus is never committed.
# With COPIES, all of it also goes that many times into FOLDER/copies_<COPIES>.jsonl, each copy with its number in front
# of every text, so that none is a duplicate: 35 MB each, to measure on more text than there is.
set -euo pipefail

fail() {
  echo "fetch_docs_corpus: $*" >&2
  exit 1
}

copies="${2:-}"
[[ $# -ge 1 && $# -le 2 && "$1" != -* && "${copies:-1}" =~ ^[1-9][0-9]*$ ]] || {
  echo "usage: scripts/fetch_docs_corpus.sh FOLDER [COPIES]" >&2
  exit 2
}
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
folder="$(realpath -m "$1")"
[[ "$folder/" != "$repository/"* ]] || fail "$folder lies inside the repository; name a folder outside it"
for tool in apt-get apt-cache dpkg-deb; do
  command -v "$tool" >/dev/null || fail "$tool is missing: this takes Debian 12 or a system that has its packages"
done
mkdir -p "$folder"

# linux-doc is an empty package that depends on the one of the present kernel.
real_package() {
  if [[ "$1" == linux-doc ]]; then
    LC_ALL=C apt-cache depends --important linux-doc 2>/dev/null | sed -n 's/^ *Depends: //p' | grep -m1 '^linux-doc-'
  else
    echo "$1"
  fi
}

fetch() {
  local name="$1" package source version
  if [[ -d "$folder/$name" ]]; then
    echo "$name: there already"
    return
  fi
  package="$(real_package "$name")" || fail "apt knows no package $name; run apt-get update, or add Debian 12's sources"
  # Beside its goal, so that the last step is a rename and a broken download never looks like a corpus.
  work="$(mktemp -d "$folder/.fetch.XXXXXX")"
  trap 'rm -rf "$work"' EXIT
  # Reason before remedy: apt's own words come first.
  (cd "$work" && apt-get -q=2 -o APT::Sandbox::User=root download "$package") ||
    fail "cannot download $package; run apt-get update, or add Debian 12's sources"
  version="$(dpkg-deb -f "$work"/*.deb Version)"
  mkdir "$work/unpacked" "$work/text"
  dpkg-deb -x "$work"/*.deb "$work/unpacked"
  source="$(find "$work/unpacked" -type d -name _sources -print -quit)"
  [[ -n "$source" ]] || fail "$package $version holds no reST sources (html/_sources)"
  (cd "$source" && find . -type f -name '*.rst.txt' -exec cp --parents -t "$work/text" {} +)
  echo "$package $version" >"$work/text/VERSION"
  chmod -R u=rwX,go=rX "$work/text"
  mv "$work/text" "$folder/$name"
  rm -rf "$work"
  trap - EXIT
  echo "$name: $(find "$folder/$name" -name '*.txt' | wc -l) files, $(find "$folder/$name" -name '*.txt' -printf '%s\n' |
    awk '{bytes += $1} END {printf "%.1f MB", bytes / 1e6}'), from $package $version"
}

fetch python3.11-doc
fetch linux-doc
if [[ -n "$copies" ]]; then
  python3 - "$folder" "$copies" <<'PYTHON'
import json
import os
import pathlib
import sys

folder, copies = pathlib.Path(sys.argv[1]), int(sys.argv[2])
goal = folder / f"copies_{copies}.jsonl"
beside = folder / f".{goal.name}"
texts = [path.read_text("utf-8") for path in sorted(folder.rglob("*.rst.txt"))]
with open(beside, "w", encoding="utf-8") as file:
    for copy in range(copies):
        for text in texts:
            file.write(json.dumps({"text": f"copy {copy}\n{text}"}, ensure_ascii=False) + "\n")
os.replace(beside, goal)
print(f"{goal.name}: {copies * len(texts)} texts, {goal.stat().st_size / 1e6:.1f} MB")
PYTHON
fi
