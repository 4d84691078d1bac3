#!/usr/bin/env bash
# A training on the hosts of a hostfile (hostfile.example) that starts again when it dies:
#
#   bash launch/hostfile.sh [OPTIONS] HOSTFILE RECIPE [key=value ...] --data DATA --out RUN ...
#
#   --ssh_port P           of the hosts' sshd
#   --launcher pdsh|ssh    how the hosts are reached (pdsh, where it is installed)
#   --master_addr A        address of the first host for the others (the one that ssh reached)
#   --restarts N           give up after N restarts (10), or after two deaths without a new checkpoint between them
#   --backoff S            wait S seconds before the first restart, twice as long before each further one (10)
#
# Start it on any machine that reaches all hosts by ssh without a password, in a folder that they all have. Every host
# needs the same checkout, environment, data and run folder at the same paths. More options of ssh, for both launchers:
# PDSH_SSH_ARGS_APPEND="-i KEY".
#
# Stop it with Ctrl-C, SIGTERM or SIGUSR1: it saves, and the same command continues. Exit codes: 0 finished, 75 stopped
# after saving, 2 the line on the screen says what to mend, 1 all else.

HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/restarts.sh"

SSH_PORT="" LAUNCHER="" ADDRESS=""
while [ $# -gt 0 ]; do
    case $1 in
        --ssh_port) number SSH_PORT "$1" "${2-}" ;;
        --launcher) LAUNCHER=${2-} ;;
        --master_addr) ADDRESS=${2-} ;;
        *) restart_option "$@" || break ;;
    esac
    has_value "$@"
    shift 2
done
[ $# -gt 1 ] && [[ $1$2 != -* ]] ||
    refuse "usage: bash $0 [OPTIONS] HOSTFILE RECIPE [key=value ...] --data DATA --out RUN ..."
HOSTFILE=$1
shift
HOSTS=("$HOSTFILE" "$SSH_PORT")
if [ -z "$LAUNCHER" ]; then
    if command -v pdsh >/dev/null; then LAUNCHER=pdsh; else LAUNCHER=ssh; fi
fi
case $LAUNCHER in pdsh | ssh) ;; *) refuse "--launcher $LAUNCHER: must be pdsh or ssh" ;; esac
[ -r "$HOSTFILE" ] || refuse "$HOSTFILE: cannot be read; see hostfile.example"
find_run "$@"

source "$HERE/environment.sh" # sets up what is missing, which takes minutes: the command line is right by now
# DeepSpeed puts both into a line for pdsh as they are.
if [ "$LAUNCHER" = pdsh ] && [[ ! $PWD$VIRTUAL_ENV =~ ^[A-Za-z0-9_./@%+=:,-]+$ ]]; then
    refuse "$PWD, $VIRTUAL_ENV: pdsh needs paths without blanks and signs; use --launcher ssh, or other folders"
fi
# A host that vanished is noticed after a minute, instead of never.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-} -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"

# The environment that travels. DeepSpeed exports the lines of the file that DS_ENV_FILE names on every host; without
# DS_ENV_FILE it would read ~/.deepspeed_env and ./.deepspeed_env, so yours are appended, and decide.
write_environment() {
    local name
    {
        for name in $(compgen -e | grep -E '^(NCCL_|GLOO_|MAGE_DS_)|^(OMP_NUM_THREADS|DS_ACCELERATOR|VIRTUAL_ENV)$'); do
            printf '%s=%s\n' "$name" "${!name}"
        done
        # shellcheck disable=SC2016  # the host's own PATH
        printf 'PATH=%s:$PATH\nMAGE_DS_LAUNCH=%s\n' "$VIRTUAL_ENV/bin" "$MARK"
        for name in ~/.deepspeed_env .deepspeed_env; do
            [ ! -f "$name" ] || grep -E '^[A-Za-z_][A-Za-z_0-9]*=' "$name" || true
        done
    } >"$DS_ENV_FILE"
}

prepare_start() {
    local meeting address port
    meeting=$(ask ready "${HOSTS[@]}") || return 1
    read -r address port <<<"$meeting"
    address=${ADDRESS:-$address}
    write_environment
    [ "$LAUNCHER" = ssh ] || note "environment on the hosts: $(cut -d= -f1 "$DS_ENV_FILE" | xargs)"
    if [ "$LAUNCHER" = ssh ]; then
        LAUNCH=(python -m mage_ds.engine.starts ssh "${HOSTS[@]}" "$address" "$port" mage_ds train)
    else
        LAUNCH=(deepspeed --quiet --hostfile "$HOSTFILE" --force_multi --launcher pdsh --no_ssh_check
            --master_addr "$address" --master_port "$port" --module)
        [ -z "$SSH_PORT" ] || LAUNCH+=(--ssh_port "$SSH_PORT")
        LAUNCH+=(mage_ds train)
    fi
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export DS_ENV_FILE=$scratch/.deepspeed_env
if [ "$LAUNCHER" = pdsh ]; then # which gives the words to a shell of the host
    mapfile -d '' -t words < <(ask quoted "$@")
    set -- "${words[@]}"
fi
train "$@"
