#!/usr/bin/env bash
# A training on this machine that starts again when it dies:
#
#   bash launch/local.sh [OPTIONS] RECIPE [key=value ...] --data DATA --out RUN ...      (as `mage-ds train`)
#
#   --num_accelerators N   ranks; without it all GPUs, or two ranks on the CPU's cores
#   --restarts N           give up after N restarts (10), or after two deaths without a new checkpoint between them
#   --backoff S            wait S seconds before the first restart, twice as long before each further one (10)
#
# Stop it with Ctrl-C, SIGTERM or SIGUSR1: it saves, and the same command continues. Exit codes: 0 finished, 75 stopped
# after saving, 2 the line on the screen says what to mend, 1 all else.

HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/restarts.sh"

RANKS=()
while [ $# -gt 0 ]; do
    case $1 in
        --num_accelerators)
            number ranks "$1" "${2-}"
            # shellcheck disable=SC2154  # number sets it
            RANKS=(--num_accelerators "$ranks")
            ;;
        *) restart_option "$@" || break ;;
    esac
    has_value "$@"
    shift 2
done
[ $# -gt 0 ] && [[ $1 != -* ]] || refuse "usage: bash $0 [OPTIONS] RECIPE [key=value ...] --data DATA --out RUN ..."
find_run "$@"

source "$HERE/environment.sh" # sets up what is missing, which takes minutes: the command line is right by now
find_accelerators
if [ "${DS_ACCELERATOR:-}" = cpu ] && [ ${#RANKS[@]} = 0 ]; then
    RANKS=(--num_accelerators "$ACCELERATORS")
fi

prepare_start() {
    local port
    port=$(free_port)
    LAUNCH=(deepspeed --quiet --hostfile /dev/null "${RANKS[@]}" --master_port "$port" --module mage_ds train)
}

train "$@"
