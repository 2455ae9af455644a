#!/usr/bin/env bash
# The whole project in one script: raw corpora, or images → shards → a trained RingFormer → scores in
# MLflow.
#
#   ./run.sh [COMMAND] [--config RECIPE] [--SECTION.KEY VALUE]...     (options may come first, too)
#
# COMMAND: all (default)  setup, prepare, train, evaluate, one after the other
#          setup          create .venv from requirements.lock
#          prepare        fetch → clean → vocabulary → binarize; of images fetch → pack
#          train          deepspeed pipeline/train.py; DEEPSPEED_ARGS go to the launcher
#          sweep          many trainings with other values of some keys: --sweep FILE [--jobs N]
#          evaluate       score the model on test sets; log and register it in MLflow; over ranks
#                         where DEEPSPEED_ARGS is set
#          translate      stdin (or --input FILE) → stdout; --model FOLDER of an export
#          serve          a server and a page: LibreTranslate's API; --model FOLDER of an export
#          score          pairs (a tab between) → how likely the model finds the translations;
#                         --rerank SOURCES picks from an n-best list
#          classify       IMAGE… (JPEG, PNG) → their classes; --model FOLDER of an export
#          export         the trained model as a folder of its own, as it is served best;
#                         [--format huggingface] for the library transformers
#          analyse        what the levels of the trained model do, in pictures and numbers
#                         [--against RECIPE_OR_EXPORT] beside those of another model
#          dashboard      MLflow's UI on 127.0.0.1:5000
#          completion     a script for bash, which completes all this: source <(./run.sh completion)
#          test           linters, type checker and tests; arguments go to pytest
#
# Every stage skips what is up to date. `./run.sh COMMAND --help` shows a command's options and the
# names of recipe keys, `--help_keys` explains those; `--version` tells which version this is.
# Exit codes: 0 done, 2 bad usage or recipe, 75 stopped by a signal (training has saved a checkpoint)
#             and the same command continues, 1 anything else.
set -euo pipefail

ROOT=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
VENV=$ROOT/.venv
MARK=$VENV/made-by-run.sh
UV=uv==0.13.9

say() { printf '%s\n' "run.sh: $*" >&2; }
fail() { say "error: $2"; exit "$1"; }

# Run a command as a process group of its own, and wait until all of it has ended. A signal to us
# stops it: see `stop`.
supervise() {
  [[ -z $stopped ]] || end_stopped
  group=starting
  set -m
  "$@" </dev/null &
  group=$!
  set +m
  [[ -z $stopped ]] || pass_on
  local status=0 tries=0
  wait "$group" || status=$?
  # `wait` ends at a signal; ranks may then take their time to save. (Zombies do not count.)
  while pgrep -g "$group" -r D,R,S,T >/dev/null 2>&1; do
    sleep 0.2
    [[ $stopped == ranks ]] || ((++tries < 50)) || kill -KILL -- "-$group" 2>/dev/null || true
  done
  if [[ -n $stopped ]]; then
    status=0
    wait "$group" || status=$?
    # Ranks say themselves that they have saved, or what went wrong with it.
    [[ $stopped == ranks && $status =~ ^(1|2|75)$ ]] && exit "$status"
    end_stopped
  fi
  group=''
  return "$status"
}

# At the first signal ask what is at work to stop, at the second one kill it.
stop() {
  case $group$stopped in
    '') stopped=all; end_stopped ;;
    starting*) stopped=all ;;
    *[!0-9]*) kill -KILL -- "-$group" 2>/dev/null || true ;;
    *) pass_on ;;
  esac
}

# Tell the ranks alone: the launcher would kill them 30 s after a signal of its own, and a checkpoint
# may take longer. Where there are none, tell all.
pass_on() {
  stopped=ranks
  if ! pkill -TERM -g "$group" -f -- --local_rank= 2>/dev/null; then
    stopped=all
    kill -TERM -- "-$group" 2>/dev/null || true
  fi
}

end_stopped() {
  case $command in
    dashboard) exit 0 ;;
    test) fail 1 "stopped by a signal" ;;
    *) say "stopped by a signal; run the same command again to continue"; exit 75 ;;
  esac
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
      2>/dev/null; then
      realpath -s "$(command -v "$candidate")"
      return
    fi
  done
  fail 1 "no Python 3.10, 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python ./run.sh"
}

# Environment from the lock file, by uv; pip where uv cannot run. A copy of the lock in .venv says
# that it was filled completely.
setup() {
  local python started=$SECONDS
  python=$(find_python)
  cd "$ROOT"
  if [[ -n $(ls -A "$VENV" 2>/dev/null) && ! -e $MARK && ! -e $VENV/requirements.lock ]]; then
    fail 1 "$VENV is there, and not made by this script; move it away"
  fi
  say "setting up $VENV with $("$python" --version) (about 8 GB, 2 minutes)"
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    { mkdir -p "$VENV" && touch "$MARK" &&
      find "$VENV/" -mindepth 1 -maxdepth 1 ! -name "${MARK##*/}" -exec rm -rf {} + &&
      "$python" -m venv "$VENV"; } ||
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
  name_accelerator
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

# The last value of an option among arguments; nothing if it is not there.
option() {
  local name=$1 value=''
  shift
  while [[ $# != 0 ]]; do
    case $1 in
      "--$name") value=${2:-} ;;
      "--$name="*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# What a run is about, as its recipe begins, and where it goes: before its first evaluation.
introduce() {
  local recipe folder
  recipe=$(option config "$@")
  recipe=${recipe:-$ROOT/recipes/quickstart.yaml}
  [[ -f $recipe ]] || return 0  # `prepare` says what is wrong
  folder=$(option run_dir "$@")
  folder=${folder:-$(sed -n "s/^run_dir: *//; T; s/ \+#.*//; s/[\"']//g; p" "$recipe")}
  [[ ! -d $folder/evaluation ]] || return 0
  sed -n '/^# /!q; s/^# /run.sh: /p' "$recipe" >&2
  say "prepare data → train → evaluate, all in ${folder:-run_dir}; Ctrl-C stops it, and the same" \
    "command goes on"
}

# A command's program, by its path: the current folder is no place to look for modules.
program() { printf '%s' "$ROOT/pipeline/$1.py"; }

prepare() { supervise python "$(program prepare)" "$@"; }

# DeepSpeed is told what it would warn of: no GPU, no file of hosts.
name_accelerator() {
  if [[ ! -e /dev/nvidiactl && ! -e /dev/dxg ]]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
}

launch() {
  local level=error
  if [[ ${DEEPSPEED_ARGS:-} == *hostfile* ]]; then level=warning; fi
  name_accelerator
  # shellcheck disable=SC2046,SC2086  # several arguments in one variable
  supervise deepspeed --log_level $level $(rendezvous) ${DEEPSPEED_ARGS:-} "$@"
}

# Over ranks where DEEPSPEED_ARGS says so, as in training.
evaluate() {
  if [[ -n ${DEEPSPEED_ARGS:-} ]]; then
    launch "$(program evaluate)" "$@"
  else
    supervise env -u RANK -u WORLD_SIZE python "$(program evaluate)" "$@"
  fi
}

train() {
  local status=0
  supervise python "$(program train)" --steps_left "$@" || status=$?
  case $status in
    0) return ;;  # finished before
    3) ;;         # steps left to train
    *) exit "$status" ;;
  esac
  say "training begins; PyTorch and DeepSpeed take some seconds to start"
  launch "$(program train)" "$@" || exit $?
  # The launcher also exits with 0 when a signal has killed its ranks.
  supervise python "$(program train)" --steps_left "$@" || fail 1 "training ended before its last step"
}

# On one machine any free port: two trainings must not meet at the launcher's fixed one.
rendezvous() {
  [[ -e /job/hostfile || ${DEEPSPEED_ARGS:-} =~ --(hostfile|master_|node_rank|no_ssh|launcher) ]] ||
    python -I -c '
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print("--master_port", probe.getsockname()[1])'
}

tests() {
  # A file's tests share what they have trained, so they stay in one process. There is one more than
  # cores, as tests wait a third of their time; two that each take all cores would be slower than one.
  local cores
  cores=$(env -u OMP_NUM_THREADS nproc)
  unset PYTHONSAFEPATH  # tests/ and benchmarks/ are not installed
  ruff check . && ruff format --check . && mypy && lint-imports --no-logo &&
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest \
      --numprocesses $((cores + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
}

# The command may come behind options; each of them has a value, but for these.
flag='^(-h|--help|--help_keys|--debug|--alignment|--fold|--prefix|--scores|--steps_left|--tokens|--.*=.*)$'
options=()
while [[ ${1:-} == -* && $# != 1 ]]; do
  options+=("$1")
  [[ $1 =~ $flag ]] || { options+=("$2"); shift; }
  shift
done
command=all
if [[ $# != 0 && ($1 != -* || $1 =~ ^(-h|--help)$) ]]; then
  command=$1
  shift
fi
set -- "${options[@]}" "$@"
[[ " $* " != *\ --version\ * ]] || command=--version
case $command in
  all | setup | prepare | train | sweep | evaluate | translate | serve | score | classify | export | analyse | dashboard | completion | test) ;;
  -h | --help | help)
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --version)
    sed -n 's/^version = "\(.*\)"/ringformer-pipeline \1/p' "$ROOT/pyproject.toml"
    exit 0
    ;;
  *) fail 2 "unknown command \`$command\`; expected all, setup, prepare, train, sweep, evaluate, translate, serve, score, classify, export, analyse, dashboard, completion or test" ;;
esac

stopped='' group=''
trap stop INT TERM HUP
# A child's own codes (a signal, a tool's) are not ours.
trap 'status=$?; [[ $status =~ ^(0|2|75)$ ]] || exit 1' EXIT
# Modules are never looked for in the current folder. (Python 3.10 does not know this variable.)
export PYTHONSAFEPATH=1

cmp -s "$ROOT/requirements.lock" "$VENV/requirements.lock" || supervise setup >&2
export PATH=$VENV/bin:$PATH
case $command in
  setup) say "environment $VENV is up to date" ;;
  all)
    if [[ " $* " =~ \ (-h|--help|--help_keys)\  ]]; then prepare "$@"; exit 0; fi
    introduce "$@"
    prepare "$@"
    train "$@"
    evaluate "$@"
    ;;
  test)
    cd "$ROOT"
    supervise tests "$@" || exit 1  # pytest's 2 means an interruption
    ;;
  prepare | train | evaluate) "$command" "$@" ;;
  serve) exec python "$(program serve)" "$@" ;;  # has our signals
  translate | score)  # has our stdin, too
    [[ ! -d /dev/stdin ]] || fail 2 "stdin is a folder, not text to $command"
    exec python "$(program "$command")" "$@"
    ;;
  sweep)  # its trainings are `run.sh train`, which end with it
    exec python "$(program sweep)" "$@"
    ;;
  *) supervise python "$(program "$command")" "$@" ;;
esac
