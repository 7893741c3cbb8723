#!/usr/bin/env bash
# Stops what start.sh runs, and waits until it is gone (FLP_STOP_S seconds, 40 if unset).
set -euo pipefail

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PID_FILE="$KIT/daemon.pid"
STOP_S=${FLP_STOP_S:-40}

# The lock, not the number in the file, tells whether it runs: numbers are used again.
running() { [[ -f "$PID_FILE" ]] && ! flock --nonblock "$PID_FILE" true; }

if ! running; then
    printf 'not running\n'
    exit 0
fi
mapfile -t pids <"$PID_FILE"
for pid in "${pids[@]}"; do
    # The supervisor passes the signal on; the program itself only if its supervisor is gone.
    [[ "$(readlink -- "/proc/$pid/cwd")" == "$KIT" ]] && kill -TERM "$pid" && break
done
for ((tenths = STOP_S * 10; tenths > 0; tenths--)); do
    if ! running; then
        printf 'stopped\n'
        exit 0
    fi
    sleep 0.1
done
printf 'stop.sh: still running after %s s: processes %s\n' "$STOP_S" "${pids[*]}" >&2
exit 1
