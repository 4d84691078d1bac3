# shellcheck shell=bash
# Sourced by local.sh and hostfile.sh, not started. Starts a training, and starts it again when it dies. A script reads
# its options, calls `find_run "$@"` and sources environment.sh; it defines `prepare_start`, which sets LAUNCH to the
# words that start it or returns 1 where that cannot be now, sets HOSTS to nothing or to hostfile and ssh port, and
# then calls `train "$@"`.

RESTARTS=10 BACKOFF=10 LONGEST_BACKOFF=300
STOPPED="" JOB="" WATCH=""
HOSTS=()

note() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2; }

ask() { python -m mage_ds.engine.starts "$@"; }

# refuse MESSAGE: what is wrong with the command line.
refuse() {
    trap - ERR
    note "$1"
    exit 2
}

# has_value OPTION [VALUE]
has_value() { [ $# -gt 1 ] || refuse "$1: needs a value"; }

# number VARIABLE OPTION VALUE: sets the variable to the value, which must be a number.
number() {
    [[ ${3-} =~ ^[0-9]+$ ]] || refuse "$2 ${3-}: must be a whole number"
    printf -v "$1" %s "$3"
}

# restart_option OPTION [VALUE]: takes an option that the scripts share; 1 where it is none of these.
restart_option() {
    case $1 in
        --restarts) number RESTARTS "$1" "${2-}" ;;
        --backoff) number BACKOFF "$1" "${2-}" ;;
        *) return 1 ;;
    esac
}

# find_run ARGUMENTS: RUN, what `--out` names.
find_run() {
    RUN=""
    while [ $# -gt 0 ]; do
        case $1 in
            --out) RUN=${2-} ;;
            --out=*) RUN=${1#--out=} ;;
        esac
        shift
    done
    [ -n "$RUN" ] || refuse "--out RUN is missing"
}

# The ranks save and end by themselves: the signal goes to them, not to `deepspeed`, which would not forward it. It is
# said again until all have ended, for ranks that were just being started.
stop() {
    local number=$1
    [ -n "$JOB" ] || return 0
    (
        trap '' INT TERM USR1 HUP
        while kill -0 "$JOB" 2>/dev/null; do
            ask tell "$MARK" "$number" "${HOSTS[@]}" || true
            number=15
            sleep 2
        done
    ) &
}

# Ends `deepspeed` when this script was killed, or the ranks would go on unseen: they notice, save and end.
watch() {
    trap '' INT TERM USR1 HUP
    while kill -0 $$ 2>/dev/null; do sleep 1; done
    kill -KILL "$JOB" 2>/dev/null
    ask gone "$MARK" "${HOSTS[@]}"
}

# One start, until its last process is gone. CODE: the exit code of `deepspeed`.
start_once() {
    before=$(ask since "$RUN")
    MAGE_DS_LAUNCH=$MARK setsid "${LAUNCH[@]}" "$@" </dev/null &
    JOB=$!
    watch &
    WATCH=$!
    while :; do
        WOKEN="" CODE=0
        wait "$JOB" || CODE=$?
        [ -n "$WOKEN" ] || break
    done
    kill -KILL "$WATCH" 2>/dev/null || true
    wait "$WATCH" 2>/dev/null || true
    JOB=""
    ask gone "$MARK" "${HOSTS[@]}" || true
}

# caught NUMBER: a signal to this script. The second one is passed on once, as a second Ctrl-C means more.
caught() {
    WOKEN=yes
    if [ -z "$STOPPED" ]; then
        note "asked to stop; the training saves its last step first"
        STOPPED=yes
        stop "$1"
    elif [ -n "$JOB" ]; then
        ask tell "$MARK" "$1" "${HOSTS[@]}" &
    fi
}

# Starts `mage-ds train ARGUMENTS` until it has an end. Exit codes: 0 finished, 2 the user can mend it, 75 stopped
# after saving, 1 it died too often or without progress.
train() {
    local word step reason last="" restarts=0 again=()
    trap 'caught 2' INT
    trap 'caught 15' TERM
    trap 'caught 10' USR1
    while :; do
        MARK=$(python -c 'import uuid; print(uuid.uuid4().hex)')
        if prepare_start; then
            start_once "$@" "${again[@]}"
            read -r word step reason <<<"$(ask ended "$RUN" "$before" "$CODE")"
        elif [ "$restarts" = 0 ]; then
            exit 2
        else
            word=absent step=$last reason="a host is missing"
        fi
        case $word in
            finished) exit 0 ;;
            refused) exit 2 ;;
            stopped) exit 75 ;;
        esac
        if [ -n "$STOPPED" ]; then
            [ "$word" = died ] || exit 75 # nothing has begun
            fail "$RUN ended without saving; its last checkpoint is of step $step"
        fi
        [ "$word" = absent ] || [ -z "$last" ] || [ "$step" -gt "$last" ] ||
            fail "$RUN died again without progress, at step $step as before: $reason"
        last=$step
        [ "$restarts" -lt "$RESTARTS" ] || fail "$RUN died at step $step ($reason); it was started $((restarts + 1)) times"
        restarts=$((restarts + 1))
        [ "$word" != died ] || again=(--resume auto) # whatever the first start went on from
        note "$RUN died at step $step ($reason); start $((restarts + 1)) in $BACKOFF s"
        sleep "$BACKOFF" &
        wait $! || kill $! 2>/dev/null || true
        [ -z "$STOPPED" ] || exit 75
        BACKOFF=$((2 * BACKOFF < LONGEST_BACKOFF ? 2 * BACKOFF : LONGEST_BACKOFF))
    done
}
