#!/usr/bin/env bash
# Opens the console with this kit. Interpreter: $FLP_PYTHON, else local/python, else python3.
set -euo pipefail
umask 077

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PY=${FLP_PYTHON:-}
if [[ -z "$PY" && -f "$KIT/local/python" ]]; then
    IFS= read -r PY <"$KIT/local/python" || true
fi
exec "${PY:-python3}" -P -m flplatform.entrypoints.admin "$KIT" "$@"
