#!/usr/bin/env bash
# Fetch Transformer Engine's pure-Python wheels, about 1 MB each, for tests/model/test_te_*.py: FOLDER/VERSION/.
set -euo pipefail
folder=$1 pip=$2
for version in 2.9.0 2.11.0 2.16.0 2.17.0 2.18.0 2.20.2; do
  [ -d "$folder/$version" ] && continue
  download=$(mktemp -d)
  "$pip" download --quiet --disable-pip-version-check --no-deps --dest "$download" "transformer-engine==$version"
  python3 -m zipfile -e "$download"/*.whl "$download/unpacked"
  mkdir -p "$folder"
  mv "$download/unpacked" "$folder/$version"
  rm -rf "$download"
done
