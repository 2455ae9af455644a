#!/usr/bin/env bash
# The whole project in one script: raw corpora → shards → a trained RingFormer → BLEU in MLflow.
#
#   ./run.sh [COMMAND] [--config RECIPE] [--SECTION.KEY VALUE]...
#
# COMMAND: all (default)  setup, prepare, train, evaluate, one after the other
#          setup          create .venv from requirements.lock
#          prepare        fetch → clean → vocabulary → binarize
#          train          deepspeed pipeline/train.py; DEEPSPEED_ARGS go to the launcher
#          evaluate       translate test sets, score them, log and register in MLflow; over ranks
#                         where DEEPSPEED_ARGS is set
#          translate      stdin (or --input FILE) → stdout; --model FOLDER of an export
#          export         the trained model as a folder of its own; --format ctranslate2
#                         [--quantization int8] for fast translation on CPUs
#          dashboard      MLflow's UI on 127.0.0.1:5000
#          test           linters, type checker and tests; arguments go to pytest
#
# Every stage skips what is up to date. `./run.sh COMMAND --help` lists every recipe key.
# Exit codes: 0 done, 2 bad usage or recipe, 75 training was stopped by a signal and has saved a
#             checkpoint (the same command continues), 1 anything else.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=$ROOT/.venv
UV=uv==0.13.9

say() { printf '%s\n' "run.sh: $*" >&2; }
fail() { say "error: $2"; exit "$1"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
      2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail 1 "no Python 3.10, 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python ./run.sh"
}

# Environment from the lock file, by uv; pip where uv cannot run. A copy of the lock in .venv says
# that it was filled completely.
setup() {
  cmp -s "$ROOT/requirements.lock" "$VENV/requirements.lock" && return
  local python started=$SECONDS
  python=$(find_python)
  say "setting up $VENV with $("$python" --version) (about 8 GB)"
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$VENV" ||
      fail 1 "cannot create $VENV; on Debian and Ubuntu: apt install python3-venv"
  fi
  if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$UV" &&
    "$VENV/bin/uv" --version >/dev/null 2>&1; then
    "$VENV/bin/uv" pip install --quiet --compile-bytecode --require-hashes \
      --python "$VENV/bin/python" -r "$ROOT/requirements.lock"
  else
    say "uv cannot run here; installing with pip, which takes some minutes"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
      -r "$ROOT/requirements.lock"
  fi || fail 1 "installing from requirements.lock failed; run the same command again to continue"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --editable "$ROOT"
  link_libsndfile
  PATH=$VENV/bin:$PATH python -m pipeline.preflight || exit 1
  cp "$ROOT/requirements.lock" "$VENV/requirements.lock"
  say "set up in $((SECONDS - started)) s"
}

# fairseq2 wants libsndfile at import and looks for it in the environment's lib; soundfile has it.
link_libsndfile() {
  local library
  library=$("$VENV/bin/python" -c '
import glob, os, sysconfig
folder = os.path.join(sysconfig.get_path("purelib"), "_soundfile_data")
print(next(iter(glob.glob(os.path.join(folder, "libsndfile*.so*"))), ""))')
  if [[ -n $library ]]; then ln -sf "$library" "$VENV/lib/libsndfile.so.1"; fi
}

prepare() { python -m pipeline.prepare "$@"; }

# Over ranks where DEEPSPEED_ARGS says so, as in training.
evaluate() {
  if [[ -z ${DEEPSPEED_ARGS:-} ]]; then
    python -m pipeline.evaluate "$@"
  else
    # shellcheck disable=SC2046,SC2086
    deepspeed --log_level warning $(rendezvous) $DEEPSPEED_ARGS "$ROOT/pipeline/evaluate.py" "$@" \
      </dev/null
  fi
}

train() {
  local status=0
  python -m pipeline.train --steps_left "$@" || status=$?
  case $status in
    0) return ;;  # finished before
    3) ;;         # steps left to train
    *) exit "$status" ;;
  esac
  # In a process group of its own: the launcher does not pass signals on to its ranks.
  set -m
  # shellcheck disable=SC2046,SC2086  # several arguments in one variable
  deepspeed --log_level warning $(rendezvous) ${DEEPSPEED_ARGS:-} "$ROOT/pipeline/train.py" "$@" \
    </dev/null &
  local group=$! stopped=''
  set +m
  trap stop_training INT TERM HUP
  status=0
  wait "$group" || status=$?
  # `wait` ends at a signal; the ranks are then still saving. (Zombies do not count.)
  while pgrep -g "$group" -r D,R,S,T >/dev/null 2>&1; do sleep 0.2; done
  trap - INT TERM HUP
  if [[ -n $stopped ]]; then
    status=0
    wait "$group" || status=$?
    [[ $status == 75 ]] || fail 1 "training was stopped; run the same command again to continue"
  fi
  [[ $status == 0 ]] || exit "$status"
  # The launcher also exits with 0 when a signal has killed its ranks.
  python -m pipeline.train --steps_left "$@" || fail 1 "training ended before its last step"
}

# Tell the ranks alone: the launcher would kill them 30 s after a signal of its own, and a checkpoint
# may take longer. Where there are none yet, tell all; at the second signal, ask no more.
stop_training() {
  if [[ -n $stopped ]]; then
    kill -KILL -- "-$group" 2>/dev/null || true
  elif ! pkill -TERM -g "$group" -f -- --local_rank= 2>/dev/null; then
    kill -TERM -- "-$group" 2>/dev/null || true
  fi
  stopped=yes
}

# On one machine any free port: two trainings must not meet at the launcher's fixed one.
rendezvous() {
  [[ -e /job/hostfile || ${DEEPSPEED_ARGS:-} =~ --(hostfile|master_|node_rank|no_ssh|launcher) ]] ||
    python -c '
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print("--master_port", probe.getsockname()[1])'
}

tests() {
  # A file's tests share what they have trained, so they stay in one process; two such processes
  # that each take all cores would be slower than one.
  ruff check . && ruff format --check . && mypy && lint-imports --no-logo &&
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest \
      --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
}

command=all
if [[ $# -gt 0 && ($1 != -* || $1 == -h || $1 == --help) ]]; then
  command=$1
  shift
fi
case $command in
  all | setup | prepare | train | evaluate | translate | export | dashboard | test) ;;
  -h | --help | help)
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *) fail 2 "unknown command \`$command\`; expected all, setup, prepare, train, evaluate, translate, export, dashboard or test" ;;
esac

# A child's own codes (a signal, a tool's) are not ours.
trap 'status=$?; [[ $status =~ ^(0|2|75)$ ]] || exit 1' EXIT

setup >&2
export PATH=$VENV/bin:$PATH
case $command in
  setup) say "environment $VENV is up to date" ;;
  all)
    prepare "$@"
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then exit 0; fi
    train "$@"
    evaluate "$@"
    ;;
  test)
    cd "$ROOT"
    tests "$@" || exit 1  # pytest's 2 means an interruption
    ;;
  prepare | train | evaluate) "$command" "$@" ;;
  *) exec python -m "pipeline.$command" "$@" ;;
esac
