#!/bin/bash
# Check types and import layers of the installed wheel, from outside the checkout: inside it, `export` and `engines` are
# top-level directories, which neither mypy nor import-linter would find under the names that users import.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Built from a copy, so that no build/ or egg-info of this run lands in the checkout.
mkdir "$work/source" "$work/site"
(cd "$root" && git ls-files -z --cached --others --exclude-standard -- \
    pyproject.toml README.md LICENSE quest_deploy export engines |
    xargs -0 sh -c 'for f; do [ -e "$f" ] && printf "%s\0" "$f"; done' _ |
    tar --null -T - -cf -) | tar -xf - -C "$work/source"
"$bin/pip" wheel -q --no-deps --no-build-isolation -w "$work" "$work/source"
"$bin/pip" install -q --no-deps --target "$work/site" "$work"/quest_deploy-*.whl

cd "$work/site"
status=0
PYTHONPATH=$work/site "$bin/lint-imports" --no-logo --config "$root/.importlinter" \
    --cache-dir "$root/.import_linter_cache" >"$work/imports" || { status=1; cat "$work/imports"; }
MYPYPATH=$work/site "$bin/mypy" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    --no-error-summary -p quest_deploy || status=1
exit "$status"
