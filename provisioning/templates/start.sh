#!/usr/bin/env bash
# Runs this kit's server or site and starts it again after a crash.
#
#   start.sh                in the foreground; Ctrl-C or SIGTERM stops it
#   start.sh --background   detached, output in logs/console.log; returns once it serves (at most
#                           FLP_READY_S seconds); stop.sh stops it
#   start.sh --once         no supervision: becomes the program (for systemd, containers)
#   start.sh --status       says whether it runs: exit code 0 serves, 3 not running, 4 not ready
#
# Interpreter: $FLP_PYTHON, else the path in local/python, else python3.
# Exit codes of the program: 0 stopped, 75 asks to be started again, 73 another process runs on
# this kit, 78 the kit or its state is wrong; after the last two nothing is started again. Anything
# else is a crash: it is started again, each time after twice the pause (FLP_BACKOFF_MS). After
# FLP_MAX_CRASHES crashes within FLP_CRASH_WINDOW_S seconds this script gives up with exit code 79.
# A full disk and the like are no crash: the program waits by itself until that has passed, and so
# does this script where it finds no room for the numbers of its processes.
set -euo pipefail
umask 077

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PID_FILE="$KIT/daemon.pid"
READY_FILE="$KIT/state/ready.json"
CONSOLE_LOG="$KIT/logs/console.log"
PLACES=("$KIT" "$KIT/state" "$KIT/logs")
BACKOFF_MS=${FLP_BACKOFF_MS:-1000}
CRASH_WINDOW_S=${FLP_CRASH_WINDOW_S:-600}
MAX_CRASHES=${FLP_MAX_CRASHES:-5}
READY_S=${FLP_READY_S:-60}
ERROR='^[^ ]+ (ERROR|CRITICAL) '
IN_USE=73 RESTART=75 WRONG_KIT=78 GAVE_UP=79

# What it is printed to may lie on a full disk: that must not end this script.
say() { printf 'start.sh: %s\n' "$*" >&2 2>/dev/null || true; }
die() { say "$1"; exit "${2:-1}"; }
stopped() { say "stopped by a signal; the program was not running"; exit 0; }

if [[ -f "$KIT/startup/fed_server.json" ]]; then
    MODULE=flplatform.entrypoints.server
    PROGRAM_LOG="$KIT/logs/server.log"
elif [[ -f "$KIT/startup/fed_client.json" ]]; then
    MODULE=flplatform.entrypoints.client
    PROGRAM_LOG="$KIT/logs/site.log"
else
    die "$KIT is not the kit of a server or a site" "$WRONG_KIT"
fi

# Prints the last error that the program logged after byte $1 of its log, since its last start; what
# kept it from being ready has passed once it is.
last_error() {
    local from=$1
    [[ -f "$PROGRAM_LOG" ]] || return 0
    (($(stat -c %s -- "$PROGRAM_LOG") >= from)) || from=0
    tail -c "+$((from + 1))" -- "$PROGRAM_LOG" | grep -aE "$ERROR|^[^ ]+ INFO +ready: | starts$" |
        tail -n 1 | grep -aE "$ERROR" | cut -c 1-500 | LC_ALL=C tr -cd '\12\40-\176' || true
}

# Prints how it ended: the last errors on the console unless the program's log is newer. What they
# promise is left out: nothing runs that would do it.
last_words() {
    if [[ -s "$CONSOLE_LOG" && ! "$CONSOLE_LOG" -ot "$PROGRAM_LOG" ]]; then
        grep -aE "$ERROR|^(start\.sh: |cannot start|[A-Za-z_.]+Error: )" -- "$CONSOLE_LOG" |
            tail -n 2 | cut -c 1-500 | LC_ALL=C tr -cd '\12\40-\176' || true
    else
        last_error 0
    fi | sed -E 's/; (starting again in|it goes on by itself|it tries again by itself) .*//'
}

# Says how little is left on the disk of $@, each of which may be a link; of the one that has
# least, and only if that is next to nothing.
disk_left() {
    local kib place
    read -r kib place < <(df -k --output=avail,file -- "$@" 2>/dev/null | tail -n +2 | sort -n) ||
        return 0
    [[ "$kib" == *[!0-9]* ]] || ((kib >= 1024)) ||
        printf '%s KiB are free on the disk of %s' "$kib" "$place"
}

# Whoever this script runs, and itself, has the lock's file open as number 9. Who has got its number
# since has not, and a zombie has nothing open.
ours() { [[ "/proc/$1/fd/9" -ef "$PID_FILE" ]]; }

# Reads the lock's file: sets `supervisor` to its first number, `pids` to those that still run, and
# `pause` to why nothing does for now.
read_pids() {
    local line
    supervisor='' pids='' pause=''
    while IFS= read -r line; do
        if [[ "$line" == *[!0-9]* ]]; then
            pause=$line
        else
            supervisor=${supervisor:-$line}
            ! ours "$line" || pids+="${pids:+ }$line"
        fi
    done <"$PID_FILE"
}

signals=0
# Does "$@" with the file of the lock as soon as there is room for it; another error than a shortage
# ends this script.
once_there_is_room() {
    local error left waited=0
    until error=$(exec 2>&1; export LC_ALL=C; "$@"); do
        case "$error" in
            *"No space left"* | *"quota exceeded"* | *"open files"* | *"allocate memory"*) ;;
            *) die "$error" ;;
        esac
        waited=$((waited + 1))
        left=$(disk_left "$KIT")
        ((waited & (waited - 1))) || # ever more rarely
            say "cannot start yet: $PID_FILE: ${error##*: }${left:+; $left}; it goes on by itself" \
                "once there is room"
        ((signals == 0)) || stopped
        sleep 1 9>&-
    done
}

MODE=${1:-}
case "$MODE" in
    "" | --background | --once) ;;
    --status)
        # The lock, not the numbers in the file, tells whether it runs: numbers are used again.
        if [[ ! -f "$PID_FILE" ]] || flock --shared --nonblock "$PID_FILE" true; then
            printf 'not running\n'
            error=$(last_words)
            [[ -n "$error" || ! -f "$READY_FILE" ]] ||
                printf 'it ended without warning: killed, or the machine went down\n'
            [[ -z "$error" ]] || printf 'last error: %s\n' "$error"
            exit 3
        fi
        read_pids
        printf 'processes: %s\n' "$pids"
        [[ -z "$pids" || "${pids%% *}" == "$supervisor" ]] ||
            printf 'not supervised: start.sh was ended; stop.sh, then start.sh\n'
        if [[ ! -f "$READY_FILE" ]]; then
            printf 'not ready%s\n' "${pause:+: $pause}"
            for what in "$(last_error 0)" "$(disk_left "${PLACES[@]}")"; do
                [[ -z "$what" ]] || printf 'last error: %s\n' "$what"
            done
            exit 4
        fi
        printf 'serves since %s: %s\n' "$(date -u -r "$READY_FILE" '+%F %T UTC')" \
            "$(tr -d '{}"\n' <"$READY_FILE")"
        exit 0
        ;;
    *) die "usage: start.sh [--background | --once | --status]" 2 ;;
esac

PY=${FLP_PYTHON:-}
if [[ -z "$PY" && -f "$KIT/local/python" ]]; then
    IFS= read -r PY <"$KIT/local/python" || true
fi
PY=${PY:-python3}
command -v -- "$PY" >/dev/null || die "there is no interpreter $PY" "$WRONG_KIT"
"$PY" -P -c 'import flplatform' 2>/dev/null ||
    die "$PY has no flplatform; write the path of the right interpreter to local/python" \
        "$WRONG_KIT"

if [[ "$(id -u)" == 0 ]]; then
    say "warning: ${KIT##*/} runs as root; an account of its own is safer"
fi
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
cd -- "$KIT"

# One instance: whoever runs holds the lock, the program included, should this script be killed.
# Whoever only asks for it, as --status, lets go of it at once.
once_there_is_room touch -- "$PID_FILE"
exec 9>>"$PID_FILE"
if ! flock --wait 0.5 9; then
    read_pids
    die "already running: $pids${pause:+; $pause}" "$IN_USE"
fi

if [[ "$MODE" == --background ]]; then
    LOG=$CONSOLE_LOG
    [[ ! -s "$LOG" ]] || mv -f -- "$LOG" "$LOG.1" || true  # how the last one ended
    { mkdir -p -- "$KIT/logs" && : >"$LOG"; } || LOG=/dev/null
    logged=$(stat -c %s -- "$PROGRAM_LOG" 2>/dev/null || echo 0)
    rm -f -- "$READY_FILE"
    exec 9>&-
    # Everything is in the program's own log, which is bounded; here it would grow for ever.
    export FLP_STDERR_LEVEL=${FLP_STDERR_LEVEL:-WARNING}
    setsid nohup "$KIT/startup/start.sh" </dev/null >>"$LOG" 2>&1 &
    for ((waited = 0; waited < READY_S * 20; waited++)); do
        [[ ! -f "$READY_FILE" ]] || break
        if ! kill -0 "$!" 2>/dev/null; then
            code=0
            wait "$!" || code=$?
            die "it stopped at once: $(tail -n 5 -- "$LOG")" "$((code ? code : 1))"
        fi
        sleep 0.05
    done
    if [[ ! -f "$READY_FILE" ]]; then
        for what in "$(last_error "$logged")" "$(disk_left "${PLACES[@]}")"; do
            [[ -z "$what" ]] || say "last error: $what"
        done
        die "started, but not ready after $READY_S s; see $LOG"
    fi
    printf 'started in the background, process %s, output in %s\n' "$!" "$LOG"
    exit 0
fi

# In place: the room that it takes is taken once. Takes numbers, and why nothing runs for now.
note() {
    local text
    text=$(printf '%s\n' "$@")
    printf '%s\n' "$text" 1<>"$PID_FILE" && truncate -s "$((${#text} + 1))" -- "$PID_FILE"
}

if [[ "$MODE" == --once ]]; then
    once_there_is_room note "$$"
    exec "$PY" -P -m "$MODULE" "$KIT"
fi

child=
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

# Says how the program ended: its exit code or signal.
exit_code() {
    local name
    printf 'exit code %s' "$code"
    if ((code > 128)) && name=$(kill -l "$((code - 128))" 2>/dev/null); then
        printf ' (signal %s)' "$name"
    fi
}

# The same with the last error that it logged.
describe_end() {
    local error
    error=$(last_error "$logged")
    printf '%s%s' "$(exit_code)" "${error:+; last error: $error}"
}

# The lock is on the file that was opened: another one of that name is another kit's.
demand_kit() {
    [[ "$PID_FILE" -ef /proc/$$/fd/9 ]] ||
        die "$KIT was moved, removed or made anew; not starting again" "$WRONG_KIT"
}

crashes=()
while ((signals == 0)); do
    demand_kit
    once_there_is_room note "$$"
    logged=$(stat -c %s -- "$PROGRAM_LOG" 2>/dev/null || echo 0)
    "$PY" -P -m "$MODULE" "$KIT" &
    child=$!
    note "$$" "$child" 2>/dev/null || true
    ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
    await_child
    child=
    case "$code" in
        0) exit 0 ;;
        "$WRONG_KIT")
            die "the kit, its local files or its state are wrong, see above; not starting again" \
                "$WRONG_KIT" ;;
        "$IN_USE") die "another process runs on this kit; not starting again" "$IN_USE" ;;
    esac
    ((signals == 0)) || exit "$code"
    demand_kit
    rm -f -- "$READY_FILE"
    if [[ "$code" == "$RESTART" ]]; then
        crashes=()
        wait_ms=$BACKOFF_MS
        why="a restart that was asked for"
        say "restart was asked for"
    else
        recent=()
        for at in ${crashes[@]+"${crashes[@]}"}; do
            ((SECONDS - at >= CRASH_WINDOW_S)) || recent+=("$at")
        done
        crashes=(${recent[@]+"${recent[@]}"} "$SECONDS")
        ((${#crashes[@]} < MAX_CRASHES)) ||
            die "gave up after ${#crashes[@]} crashes within $CRASH_WINDOW_S s: $(describe_end)" \
                "$GAVE_UP"
        wait_ms=$((BACKOFF_MS * (1 << (${#crashes[@]} - 1))))
        why="crash ${#crashes[@]} of $MAX_CRASHES: $(exit_code)"
        say "$(describe_end); starting again in $wait_ms ms"
    fi
    next=$(date -u -d "$((wait_ms / 1000)) seconds" '+at %F %T UTC') || next=soon
    note "$$" "pauses after $why; starts again $next" 2>/dev/null || true
    sleep "$((wait_ms / 1000)).$(printf '%03d' $((wait_ms % 1000)))" 9>&- &
    child=$!
    ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
    await_child
    child=
done
stopped
