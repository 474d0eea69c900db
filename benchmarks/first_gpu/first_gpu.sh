#!/usr/bin/env bash
# Measure the first minutes on a GPU, the most important first: bash benchmarks/first_gpu/first_gpu.sh [STAGE ...]
#
# Installs nothing: python3, or KIT_PYTHON, has the project's requirements and its extra `test`. As .gpu/kit/first_gpu.sh,
# where .gpu traveled to a machine without a network, it installs the wheels of .gpu/whl into KIT_SITE first.
#
# Each stage has its own time limit, writes into $OUT/all.log as it goes, and prints VERDICT lines, which are kept in
# $OUT/verdicts.txt. What was tried is marked in $KIT_WORK/done, so a second call goes on where the first ended; naming
# stages runs those again. No stage begins that would run longer than KIT_BUDGET seconds. KIT_DRY=1: all of it on a CPU,
# with a tiny model; KIT_PATIENCE multiplies budget and limits there, for busy machines.
set -u -o pipefail

KIT=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$KIT/../.." && pwd)
cd "$ROOT" || exit 2
export OUT=${OUT:-/tmp/kit-out} KIT_WORK=${KIT_WORK:-/tmp/kit} KIT_DRY=${KIT_DRY:-0}
PATIENCE=1
[ "$KIT_DRY" = 1 ] && PATIENCE=${KIT_PATIENCE:-1}
BUDGET=$((${KIT_BUDGET:-575} * PATIENCE))
PY=${KIT_PYTHON:-python3}
STARTED=$(date +%s)
WANTED=" $* "
DONE=$KIT_WORK/done
LOGS=$KIT_WORK/logs
mkdir -p "$OUT" "$DONE" "$LOGS" "$KIT_WORK/meta"
touch "$KIT_WORK/verdicts-before.txt"
cp "$KIT_WORK/verdicts-before.txt" "$OUT/verdicts.txt"

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 BITSANDBYTES_NOWELCOME=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what Hopper takes anyway, and what deterministic runs ask for
export KIT_PLANS=${KIT_PLANS:-$KIT/plans.json}
[ -f "$KIT_PLANS" ] || KIT_PLANS=$KIT_WORK/plans.json

# Checkpoints record the project's version, for which a checkout that is not installed has no metadata.
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
mkdir -p "$KIT_WORK/meta/qlora_trainer-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\nName: qlora-trainer\nVersion: %s\n' "$VERSION" \
  > "$KIT_WORK/meta/qlora_trainer-$VERSION.dist-info/METADATA"
export PYTHONPATH="$ROOT:$ROOT/kernels:$KIT_WORK/meta${PYTHONPATH:+:$PYTHONPATH}"

left() { echo $((BUDGET - ($(date +%s) - STARTED))); }
say() { printf '%4ds %s\n' $(($(date +%s) - STARTED)) "$*" | tee -a "$OUT/verdicts.txt" "$KIT_WORK/verdicts-before.txt"; }
say_verdicts() { { grep -a --line-buffered '^VERDICT ' || true; } | while IFS= read -r line; do say "${line#VERDICT }"; done; }
is_wanted() { case "$WANTED" in "  " | *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# stage NAME LIMIT LEAST COMMAND...: at most LIMIT seconds; not begun with less than LEAST left. Returns the command's
# status; 99 where it was not run, 124 where it was out of time.
stage() {
  local name=$1 limit=$(($2 * PATIENCE)) least=$3 rc rest begun taken
  shift 3
  is_wanted "$name" || return 99
  [ "$WANTED" = "  " ] && [ -e "$DONE/$name" ] && return 99
  rest=$(left)
  if [ "$rest" -lt "$least" ]; then say "$name: left out, $rest s left"; return 99; fi
  [ "$rest" -lt "$limit" ] && limit=$rest
  touch "$DONE/$name"
  begun=$(date +%s)
  export KIT_DEADLINE=$((begun + limit)) # no step begins that would outlast it
  printf '\n===== %s (at most %s s): %s\n' "$name" "$limit" "$*" >> "$OUT/all.log"
  : > "$LOGS/$name.log"
  timeout -k 5 "$limit" "$@" < /dev/null 2>&1 | tee -a "$OUT/all.log" "$LOGS/$name.log" | say_verdicts
  rc=${PIPESTATUS[0]}
  taken=$(($(date +%s) - begun))
  # A command that TERM does not end is killed too, 5 s after its limit.
  [ "$rc" = 137 ] && [ "$taken" -ge "$limit" ] && rc=124
  case $rc in
    0 | 75) ;; # 75: CUDA broke, which its verdict says
    124) say "$name: OUT OF TIME after $limit s" ;;
    137) say "$name: KILLED after $taken of $limit s, as the system does where memory runs out" ;;
    *) say "$name: exit $rc" ;;
  esac
  return "$rc"
}

pytests() { # NAME LIMIT LEAST WORKERS PATHS...
  local name=$1 limit=$2 least=$3 workers=$4 options="-m gpu"
  shift 4
  [ "$KIT_DRY" = 1 ] && { options="-m gpu --collect-only"; workers=0; }
  # shellcheck disable=SC2086
  stage "$name" "$limit" "$least" "$PY" -m pytest $options -n "$workers" -rfE --tb=short --timeout=150 \
    -p no:cacheprovider --junitxml="$OUT/junit-$name.xml" "$@"
  [ $? = 99 ] && return
  say "$name: $(grep -aE '[0-9]+ (passed|failed|errors?|skipped)|tests? collected' "$LOGS/$name.log" | tail -1)"
  grep -aE '^(FAILED|ERROR) ' "$LOGS/$name.log" | cut -c1-230 | head -25 | while IFS= read -r line; do say "  $line"; done
}

big() { # LIMIT STEPS...: those not tried yet, or named; in one process, and in another where one ended it
  local limit=$1 names="" name todo named rc
  shift
  for name in "$@"; do
    is_wanted "$name" || continue
    [ "$WANTED" = "  " ] || rm -f "$DONE/big-$name"
    names="$names $name"
  done
  for _ in 1 2 3 4; do
    todo=""
    for name in $names; do [ -e "$DONE/big-$name" ] || todo="$todo $name"; done
    [ -n "$todo" ] || return
    rm -f "$DONE/big"
    named=$WANTED WANTED="  "
    # shellcheck disable=SC2086
    stage big "$limit" 45 "$PY" "$KIT/gpu_run.py" big $todo
    rc=$?
    WANTED=$named
    case $rc in 0 | 99 | 124) return ;; esac
  done
}

# --- setting up -------------------------------------------------------------------------------------------------------
if [ "$KIT" = "$ROOT/.gpu/kit" ]; then
  SITE=${KIT_SITE:-/tmp/site}
  if [ ! -d "$SITE/transformers" ] && ! "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --upgrade --target "$SITE" .gpu/whl/*.whl >> "$OUT/all.log" 2>&1; then
    say "setup: FAILED: the wheels of .gpu/whl cannot be installed"
    tail -5 "$OUT/all.log"
    exit 3
  fi
  say "setup: $(ls .gpu/whl/*.whl | wc -l) wheels installed"
  export PYTHONPATH="$SITE:$PYTHONPATH"
fi
[ "$KIT_DRY" = 1 ] || nvidia-smi >> "$OUT/all.log" 2>&1

# Where the checkpoint and the runs are: in memory if there is space for 16 GB and the merged model, else on the disk.
if [ -z "${KIT_MODEL:-}" ] && [ "$KIT_DRY" != 1 ]; then
  free=$(df --output=avail -B1 /dev/shm 2> /dev/null | tail -1 | tr -d ' ')
  if [ "${free:-0}" -gt 45000000000 ] || [ -e /dev/shm/kit/model ]; then
    mkdir -p /dev/shm/kit/runs
    export KIT_MODEL=/dev/shm/kit/model
    [ -e "$KIT_WORK/runs" ] || ln -s /dev/shm/kit/runs "$KIT_WORK/runs"
  fi
fi
export KIT_MODEL=${KIT_MODEL:-$KIT_WORK/model}
[ "$KIT_DRY" = 1 ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# shellcheck disable=SC1091
[ -f "$KIT_WORK/settings.sh" ] && . "$KIT_WORK/settings.sh"

# --- stages -----------------------------------------------------------------------------------------------------------
# Expandable segments and managed memory may be refused, by a virtual machine for one. What was tried and printed no line
# was refused, and all goes on without.
try_environment() { stage env 90 20 "$PY" "$KIT/gpu_run.py" env; }
was_refused() { [ "$KIT_DRY" != 1 ] && ! grep -aq "^VERDICT env: $1" "$LOGS/env.log"; }
try_environment
rc=$?
[ $rc = 4 ] && { rm -f "$DONE/env"; exit 4; }
if [ $rc != 99 ] && was_refused "allocating works"; then
  say "env: nothing could be allocated with $PYTORCH_ALLOC_CONF; trying without expandable segments"
  echo 'export PYTORCH_ALLOC_CONF=expandable_segments:False' >> "$KIT_WORK/settings.sh"
  export PYTORCH_ALLOC_CONF=expandable_segments:False
  rm -f "$DONE/env"
  try_environment
  was_refused "allocating works" && { say "env: FAILED: CUDA computes nothing here"; rm -f "$DONE/env"; exit 4; }
fi
if [ $rc != 99 ] && [ -z "${KIT_NO_PAGED:-}" ] && was_refused "managed memory works"; then
  say "env: managed memory is REFUSED here ($(tail -1 "$LOGS/env.log" | cut -c1-200)); optimizers go without paging"
  echo 'export KIT_NO_PAGED=1' >> "$KIT_WORK/settings.sh"
  export KIT_NO_PAGED=1
fi

stage doctor 90 20 "$PY" -m qlora_trainer doctor
if [ $? != 99 ]; then
  say "doctor:$(for kind in ok note problem; do printf ' %s %s' "$(grep -acE "^ *$kind " "$LOGS/doctor.log")" "$kind"; done)"
  grep -aE '^ *(note|problem) ' "$LOGS/doctor.log" | cut -c1-200 | while IFS= read -r line; do say "  $line"; done
fi

# The checkpoint is made while the first tests run: it is the card's and the memory's work, theirs the processors'.
MAKING=
if is_wanted make && { [ "$WANTED" != "  " ] || [ ! -e "$DONE/make" ]; }; then
  touch "$DONE/make"
  { timeout $((200 * PATIENCE)) "$PY" "$KIT/gpu_run.py" make > "$LOGS/make.log" 2>&1; echo $? > "$LOGS/make.rc"; } &
  MAKING=$!
fi

pytests tests-kernels 150 40 8 tests/kernels/test_operations.py tests/kernels/test_triton_kernels.py tests/kernels/test_varlen_attention.py \
  tests/kernels/test_varlen_attention_on_cards.py \
  tests/model/test_fingerprint.py tests/weights/test_nf4.py tests/weights/test_stream.py \
  tests/training/memory/test_activations.py tests/training/test_rng.py tests/training/test_optimizer.py

if [ -n "$MAKING" ]; then
  wait "$MAKING"
  cat "$LOGS/make.log" >> "$OUT/all.log"
  say_verdicts < "$LOGS/make.log"
  rc=$(cat "$LOGS/make.rc")
  [ "$rc" = 0 ] || { say "make: exit $rc: $(tail -1 "$LOGS/make.log" | cut -c1-200)"; rm -f "$DONE/make"; }
fi

big 230 2k-full 2k-8gb profile 2k-none 16k-12gb resume generate paging keep_adapter
pytests tests-runs 160 45 8 tests/test_gpu.py tests/test_gpu_kinds.py tests/training/test_recovery_from_real_failures.py tests/model/test_fill.py \
  tests/merging/test_streamed_model.py tests/model/modules/test_cpu_embedding.py tests/merging/test_fold.py tests/cli/test_doctor.py
stage peer 110 45 "$PY" "$KIT/gpu_run.py" peer
stage kernels 60 25 "$PY" "$KIT/gpu_run.py" kernels
big 400 16k-24gb 64k-16gb hostcopy 2k-12gb merge 64k-24gb 2k-6gb-memory-efficient 16k-8gb-memory-efficient
# Not in a run without names but a dry one: the comparison that the project's own benchmark makes, on chat rows.
if [ "$WANTED" != "  " ] || [ "$KIT_DRY" = 1 ]; then
  dry=""
  [ "$KIT_DRY" = 1 ] && dry="--dry-run"
  # shellcheck disable=SC2086
  stage contenders 200 60 "$PY" -m benchmarks.gpu "$KIT_MODEL" "$KIT_WORK/chat.jsonl" --steps 6 --batch-size 8 $dry
  [ $? = 99 ] || tail -8 "$LOGS/contenders.log" | while IFS= read -r line; do say "  $line"; done
fi
say "ended, $(left) s of the budget left; in $OUT: $(ls "$OUT" | tr '\n' ' ')"
