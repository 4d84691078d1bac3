#!/usr/bin/env bash
# Tests of the checkout, set-up included:   bash launch/test.sh [fast|full|gpu] [pytest arguments]
#
#   fast       ruff, and the tests that start no processes: 2 minutes
#   (nothing)  ruff, and all tests but the long ones and those that need a GPU: 22 minutes on 2 cores
#   full       all tests but those that need a GPU; as root on Debian it installs ssh, pdsh and SLURM for the cluster tests
#   gpu        the tests that need a GPU
#
# As root on Debian all but `gpu` install the font and the list of the emoji sample, if they are not there (18 MB).

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"

selection=default
case "${1-}" in
    fast | full | gpu)
        selection=$1
        shift
        ;;
esac
case $selection in
    fast) markers="not processes and not full and not gpu" expected="2 minutes" ;;
    default) markers="not full and not gpu" expected="22 minutes" ;;
    full) markers="not gpu" expected="90 minutes" ;;
    gpu) markers="gpu" expected="10 minutes" ;;
esac
if [ "$selection" != gpu ]; then
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu # the same tests on every machine
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Pictures of the emoji sample, and what lets Pillow draw flags and skin tones. Without root their tests are skipped.
if [ "$selection" != gpu ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    packages=$(for package in fonts-noto-color-emoji unicode-data libfribidi0; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || echo "$package"
    done | xargs)
    # shellcheck disable=SC2086  # a list of words
    [ -z "$packages" ] || apt_install $packages
fi

# The tests of clusters start an sshd in network namespaces, and a SLURM. Without root they say that they are skipped.
if [ "$selection" = full ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    packages=$(PATH=$PATH:/usr/sbin:/sbin
        for pair in pdsh:pdsh ssh:openssh-client sshd:openssh-server ip:iproute2 munged:munge slurmctld:slurm-wlm; do
            command -v "${pair%:*}" >/dev/null || echo "${pair#*:}"
        done | xargs)
    # shellcheck disable=SC2086  # a list of words
    [ -z "$packages" ] || apt_install $packages
fi

stage "ruff" "2 seconds"
ruff check || fail "ruff check found something (above)"
ruff format --check || fail "not formatted: run ruff format"
stage "pytest -m '$markers'" "$expected"
python -m pytest -m "$markers" "$@" || fail "pytest ended with exit code $?"
