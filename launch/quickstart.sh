#!/usr/bin/env bash
# From nothing to pictures of handwritten digits, set-up included:   bash launch/quickstart.sh [--classes] [FOLDER]
#
# --classes goes on to pictures of the digit that is asked for, three minutes more.
#
# Everything goes to FOLDER (./quickstart). Start it again to go on after an interruption: what is finished is skipped,
# a training that was stopped continues where it was.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

CLASSES=""
if [ "${1-}" = --classes ]; then
    CLASSES=yes
    shift
fi
OUT=${1:-quickstart}
PICTURES=256 ASKED=200
[ $# -le 1 ] && [[ $OUT != -* ]] || fail "usage: bash launch/quickstart.sh [--classes] [FOLDER]"
OUT=${OUT%/}
DATA=$OUT/digits TOKENIZER=$OUT/tokenizer MAGE=$OUT/mage SAMPLES=$OUT/samples LOGS=$OUT/logs
CONDITIONAL=$OUT/class_conditional BY_CLASS=$OUT/samples_by_class
mkdir -p "$LOGS" 2>/dev/null && [ -w "$LOGS" ] || fail "$OUT: cannot be written; name another folder: bash $0 FOLDER"

# says FILE KEY VALUE: exit 0 where the JSON file holds this value. What a stage wrote down counts, not the exit code of
# `deepspeed`, which is 0 after some failures.
says() {
    python -c 'import json, sys
try:
    sys.exit(str(json.load(open(sys.argv[1]))[sys.argv[2]]) != sys.argv[3])
except (OSError, ValueError, KeyError, TypeError):
    sys.exit(1)' "$@"
}

prepared() { [ -f "$DATA/prepared.json" ]; }
tokenizer_trained() { says "$TOKENIZER/status.json" state finished; }
mage_trained() { says "$MAGE/status.json" state finished; }
# Samples of an older training do not count: `sample` then says what differs.
complete_since() { says "$1/manifest.json" complete True && [ "$1/manifest.json" -nt "$2/checkpoints/latest/meta.json" ]; }
sampled() { complete_since "$SAMPLES" "$MAGE"; }
evaluated() { [ "$SAMPLES/results.json" -nt "$SAMPLES/manifest.json" ]; }
conditional_trained() { says "$CONDITIONAL/status.json" state finished; }
sampled_by_class() { complete_since "$BY_CLASS" "$CONDITIONAL"; }
evaluated_by_class() { [ "$BY_CLASS/results.json" -nt "$BY_CLASS/manifest.json" ]; }

# A power of two, which divides the batch.
count_processes() {
    find_accelerators
    PROCESSES=1
    while [ $((2 * PROCESSES)) -le "$ACCELERATORS" ]; do PROCESSES=$((2 * PROCESSES)); done
}

# What mage_ds says reaches the screen; all else, the launcher's lines too, stands in the log only.
follow() {
    trap '' INT # Ctrl-C is for the stage, which saves first and says so
    tee -a "$LOGS/$1.log" | grep --line-buffered -v -e '^\[20[0-9-]* ' -e '^$' || true
}

# launched NAME ARGUMENTS: `mage-ds ARGUMENTS` by DeepSpeed's launcher, in PROCESSES processes.
launched() {
    local name=$1 port
    shift
    port=$(free_port)
    printf '\n$ %s\n' "deepspeed --num_accelerators $PROCESSES --module mage_ds $*" | tee -a "$LOGS/$name.log"
    deepspeed --quiet --hostfile /dev/null --num_accelerators "$PROCESSES" --master_port "$port" --module mage_ds "$@" \
        2>>"$LOGS/$name.log" | follow "$name" || true
}

plain() {
    local name=$1
    shift
    printf '\n$ mage-ds %s\n' "$*" | tee -a "$LOGS/$name.log"
    python -m mage_ds "$@" 2>>"$LOGS/$name.log" | follow "$name" || true
}

# run NAME IS_DONE TITLE TIME HOW ARGUMENTS: one stage, unless it is finished.
run() {
    local name=$1 done=$2 title=$3 expected=$4 reason
    shift 4
    if "$done"; then
        printf '%-10s finished already\n' "$name"
        return
    fi
    WORKED=yes
    stage "$title" "$expected"
    : >"$LOGS/$name.log"
    [ -n "${PROCESSES:-}" ] || count_processes
    "$1" "$name" "${@:2}"
    [ -z "$STOPPED" ] || fail "stopped; start it again to go on (log: $LOGS/$name.log)"
    if ! "$done"; then
        reason=$(grep -E '^[a-z-]+: error: |^[A-Za-z.]*(Error|Exception)\b' "$LOGS/$name.log" | tail -n 1) || true
        fail "$name failed: ${reason:-it ended without a result} (all of it: $LOGS/$name.log)"
    fi
}

STOPPED="" WORKED=""
trap 'STOPPED=yes' INT TERM

began=$SECONDS
run prepare prepared "making a data set of 1,797 handwritten digits in $DATA" "5 seconds" \
    plain prepare --sample digits --out "$DATA"
run tokenizer tokenizer_trained "training the tokenizer: pictures to 4 x 4 tokens and back" "1 minute on 2 cores" \
    launched train digits_tokenizer --data "$DATA" --out "$TOKENIZER"
run mage mage_trained "training the MAGE: which tokens belong together" "3 minutes on 2 cores" \
    launched train digits_mage --data "$DATA" --tokenizer "$TOKENIZER" --out "$MAGE"
run samples sampled "sampling $PICTURES pictures from nothing" "20 seconds" \
    launched sample "$MAGE" -n "$PICTURES" --out "$SAMPLES"
run evaluate evaluated "judging the pictures" "15 seconds" \
    plain evaluate "$SAMPLES" --reference "$DATA" --metrics readable --run "$MAGE"
if [ -n "$CLASSES" ]; then
    run conditional conditional_trained "training a decoder that is told the digit, on the MAGE's encoder" "2 minutes on 2 cores" \
        launched train digits_class_conditional --data "$DATA" --init "$MAGE" --out "$CONDITIONAL"
    run by_class sampled_by_class "sampling $ASKED pictures, each digit in turn" "20 seconds" \
        launched sample "$CONDITIONAL" -n "$ASKED" --out "$BY_CLASS"
    run judged_by_class evaluated_by_class "judging whether they show what was asked for" "15 seconds" \
        plain evaluate "$BY_CLASS" --reference "$DATA" --metrics readable
fi
minutes=$(((SECONDS - began) / 60)) seconds=$(((SECONDS - began) % 60))
if [ -n "$WORKED" ]; then
    printf '\n== all is done, in %dm%02ds. Look at\n' "$minutes" "$seconds"
else
    printf '\n== all is done already. Look at\n'
fi

[ -n "${PROCESSES:-}" ] || count_processes
SEVERAL=$PROCESSES
if [ "${DS_ACCELERATOR:-}" = cpu ]; then SEVERAL=2; fi
newest() { printf '%s\n' "$1"/step_*.png | tail -n 1; }

cat <<SCREEN
   $SAMPLES/grid.png
        the $PICTURES samples, unselected
   $(newest "$TOKENIZER/pictures")
        the tokenizer: originals, and below them what is left of them in 16 tokens
   $(newest "$MAGE/pictures")
        the MAGE: what it saw, what it made of it, and samples
   $TOKENIZER/pictures/loss.png
   $MAGE/pictures/loss.png
        the loss curves; with all figures: tensorboard --logdir $OUT
   $SAMPLES/results.json
        how many samples are readable, which digits, and whether they are copies
$(if [ -n "$CLASSES" ]; then
    printf '   %s\n        samples by class, a row for each digit\n' "$BY_CLASS/grid.png"
else
    printf '\nPictures of the digit that you ask for:   bash launch/quickstart.sh --classes %s\n' "$OUT"
fi)

Next, after   source $VIRTUAL_ENV/bin/activate
1. a folder of your own pictures (class folders or flat):
   mage-ds prepare YOUR_FOLDER --out mine && mage-ds train digits_tokenizer --data mine --out mine_tokenizer
2. the paper's ViT-B at 256 px, two steps of four pictures to see that it runs:
   mage-ds prepare --sample photos --out photos && mage-ds train pretrain_vit_base batch=4 duration.steps=2 \\
       --data photos --tokenizer random --out vit_base
3. the same work in $SEVERAL processes, here more samples (seed 1):
   deepspeed --num_accelerators $SEVERAL --module mage_ds sample $MAGE -n 1024 --seed 1 --out $OUT/more_samples
SCREEN
