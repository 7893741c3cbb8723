#!/usr/bin/env bash
# Runs this kit's server or site and starts it again after a crash.
#
#   start.sh                in the foreground; Ctrl-C or SIGTERM stops it
#   start.sh --background   detached, output in logs/console.log; returns once it serves (at most
#                           FLP_READY_S seconds); stop.sh stops it
#   start.sh --once         no supervision: becomes the program (for systemd, containers)
#
# Interpreter: $FLP_PYTHON, else the path in local/python, else python3.
# Exit codes of the program: 0 stopped, 75 asks to be started again, 78 the kit is wrong
# (starting again would not help); anything else is a crash. After five crashes in a row, each
# within FLP_QUICK_S seconds of its start, this script gives up with exit code 1.
set -euo pipefail
umask 077

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PID_FILE="$KIT/daemon.pid"
BACKOFF_MS=${FLP_BACKOFF_MS:-1000}
QUICK_S=${FLP_QUICK_S:-60}
READY_S=${FLP_READY_S:-60}
MAX_CRASHES=5

say() { printf 'start.sh: %s\n' "$*" >&2; }
die() { say "$1"; exit "${2:-1}"; }

if [[ -f "$KIT/startup/fed_server.json" ]]; then
    MODULE=flplatform.entrypoints.server
elif [[ -f "$KIT/startup/fed_client.json" ]]; then
    MODULE=flplatform.entrypoints.client
else
    die "$KIT is not the kit of a server or a site" 78
fi

MODE=${1:-}
case "$MODE" in
    "" | --background | --once) ;;
    *) die "usage: start.sh [--background | --once]" 2 ;;
esac

PY=${FLP_PYTHON:-}
if [[ -z "$PY" && -f "$KIT/local/python" ]]; then
    IFS= read -r PY <"$KIT/local/python" || true
fi
PY=${PY:-python3}
command -v -- "$PY" >/dev/null || die "there is no interpreter $PY" 78
"$PY" -P -c 'import flplatform' 2>/dev/null ||
    die "$PY has no flplatform; write the path of the right interpreter to local/python" 78

if [[ "$(id -u)" == 0 ]]; then
    say "warning: ${KIT##*/} runs as root; an account of its own is safer"
fi
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
cd -- "$KIT"

# One instance: whoever runs holds the lock, the program included, should this script be killed.
exec 9>>"$PID_FILE"
flock --nonblock 9 || die "already running: $(tr '\n' ' ' <"$PID_FILE")"

if [[ "$MODE" == --background ]]; then
    LOG="$KIT/logs/console.log"
    mkdir -p -- "$KIT/logs"
    : >"$LOG"
    rm -f -- "$KIT/state/ready.json"
    exec 9>&-
    setsid nohup "$KIT/startup/start.sh" </dev/null >>"$LOG" 2>&1 &
    for ((waited = 0; waited < READY_S * 20; waited++)); do
        [[ ! -f "$KIT/state/ready.json" ]] || break
        kill -0 "$!" 2>/dev/null || die "it stopped at once: $(tail -n 5 -- "$LOG")"
        sleep 0.05
    done
    [[ -f "$KIT/state/ready.json" ]] || die "started, but not ready after $READY_S s; see $LOG"
    printf 'started in the background, process %s, output in %s\n' "$!" "$LOG"
    exit 0
fi

note_pids() {
    : >"$PID_FILE"
    printf '%s\n' "$@" >>"$PID_FILE"
}

if [[ "$MODE" == --once ]]; then
    note_pids "$$"
    exec "$PY" -P -m "$MODULE" "$KIT"
fi

child=
signals=0
on_signal() {
    signals=$((signals + 1))
    [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap on_signal TERM INT HUP

# Waits for $child, however often a signal interrupts the waiting; its exit code is in $code.
await_child() {
    local before
    while :; do
        before=$signals
        code=0
        wait "$child" || code=$?
        [[ "$before" != "$signals" ]] || return 0
    done
}

crashes=0
while ((signals == 0)); do
    note_pids "$$"
    started=$SECONDS
    "$PY" -P -m "$MODULE" "$KIT" &
    child=$!
    note_pids "$$" "$child"
    ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
    await_child
    child=
    case "$code" in
        0) exit 0 ;;
        78) die "the kit or its local files are wrong, see above; not starting again" 78 ;;
    esac
    ((signals == 0)) || exit "$code"
    if [[ "$code" == 75 ]]; then
        crashes=0
        wait_ms=$BACKOFF_MS
        say "restart was asked for"
    else
        ((SECONDS - started < QUICK_S)) || crashes=0
        crashes=$((crashes + 1))
        ((crashes < MAX_CRASHES)) ||
            die "gave up: $crashes crashes, each within $QUICK_S s (last exit code $code)"
        wait_ms=$((BACKOFF_MS * (1 << (crashes - 1))))
        say "exit code $code; starting again in $wait_ms ms"
    fi
    sleep "$((wait_ms / 1000)).$(printf '%03d' $((wait_ms % 1000)))" &
    child=$!
    await_child
    child=
done
