#!/usr/bin/env bash
# Stops what start.sh runs, and waits until it is gone. What has not ended after FLP_STOP_S seconds
# (40 if unset) is killed: log and spool survive that, as they survive a power cut.
set -euo pipefail

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PID_FILE="$KIT/daemon.pid"
STOP_S=${FLP_STOP_S:-40}
KILL_S=5

# The lock, not the number in the file, tells whether it runs: numbers are used again.
running() { [[ -f "$PID_FILE" ]] && ! flock --shared --nonblock "$PID_FILE" true; }

# Whoever start.sh runs has the lock's file open as number 9.
ours() { [[ "/proc/$1/fd/9" -ef "$PID_FILE" ]]; }

# Sets `pids` to those in the file, or, where a full disk took none, to those found by `ours`.
read_pids() {
    local found
    mapfile -t pids < <(grep -xE '[0-9]+' -- "$PID_FILE") # and not why start.sh pauses
    ((${#pids[@]} == 0)) || return 0
    for found in /proc/[0-9]*; do
        ! ours "${found#/proc/}" || pids+=("${found#/proc/}")
    done
}

# Waits at most $1 seconds until nothing runs.
await_end() {
    local tenths
    for ((tenths = $1 * 10; tenths > 0; tenths--)); do
        running || return 0
        sleep 0.1
    done
    return 1
}

if ! running; then
    printf 'not running\n'
    exit 0
fi
read_pids
for pid in "${pids[@]}"; do
    # The supervisor passes the signal on; the program itself only if its supervisor is gone.
    ours "$pid" && kill -TERM "$pid" && break
done
if await_end "$STOP_S"; then
    printf 'stopped\n'
    exit 0
fi
read_pids
for pid in "${pids[@]}"; do
    ours "$pid" && kill -KILL "$pid" || true
done
if await_end "$KILL_S"; then
    printf 'stopped, killed after %s s: processes %s\n' "$STOP_S" "${pids[*]}"
    exit 0
fi
printf 'stop.sh: still running: processes %s\n' "${pids[*]}" >&2
exit 1
