"""Training runs on two hosts: network namespaces, each with an address, and a cable between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import ROOT
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import new_run, tracked, train, weights

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS = 16
OPTIONS = [
    *("--model.dropout", "0"),
    *("--training.max_steps", str(STEPS), "--training.checkpoint_every", "4"),
    *("--training.log_every", "1", "--training.validate_every", str(STEPS)),
]
ADDRESSES = ("10.0.0.1", "10.0.0.2")


def training(recipe: Path, run_dir: Path) -> list[str]:
    """Return the script, with its arguments, that any launcher is to launch."""
    script = str(ROOT / "pipeline" / "train.py")
    return [script, "--config", str(recipe), "--run_dir", str(run_dir), *OPTIONS]


def ip(*arguments: str) -> str:
    """Run the program `ip`, and return what it says."""
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Make two network namespaces; kill what is left running in them afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("two hosts are two network namespaces, which need root and the program `ip`")
    names = (f"ringformer{os.getpid()}a", f"ringformer{os.getpid()}b")
    try:
        with ExitStack() as stack:
            for name in names:
                ip("netns", "add", name)
                stack.callback(remove_host, name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth",
               "peer", "name", "eth0", "netns", names[1])  # fmt: skip
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
            yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")


def kill_host(name: str) -> None:
    """Send SIGKILL to all that runs there."""
    for pid in ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def remove_host(name: str) -> None:
    """Remove a network namespace and all that runs in it."""
    kill_host(name)
    ip("netns", "del", name)


@contextmanager
def launched(
    hosts: Sequence[str], launcher: str, script: Sequence[str], logs: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a command on each host, without ssh; what they say goes to `logs`/0 and `logs`/1."""
    logs.mkdir()
    (logs / "hosts.txt").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    options = {
        "deepspeed": ["--hostfile", str(logs / "hosts.txt"), "--no_ssh"],
        "torchrun": ["--nnodes", "2", "--nproc_per_node", "1"],
    }[launcher]
    master = ["--master_addr", ADDRESSES[0], "--master_port", "29500"]
    with ExitStack() as stack:
        commands = []
        for rank, host in enumerate(hosts):
            log = stack.enter_context((logs / str(rank)).open("wb"))
            command = [str(BIN / launcher), *options, "--node_rank", str(rank), *master, *script]
            commands.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0"},
                )
            )
        yield commands


def wait_for(text: str, log: Path, command: subprocess.Popen[bytes]) -> None:
    """Wait until the log of a command says `text`."""
    while text not in log.read_text():
        assert command.poll() is None, log.read_text()
        time.sleep(0.02)


def test_a_host_dies_and_training_goes_on_as_if_it_had_not(
    hosts: tuple[str, str], prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    """The first of two hosts is killed, at ZeRO stage 3, and both are started again (by the other
    launcher); they end as one host that ran undisturbed, at stage 1."""
    config = tmp_path / "ds.json"
    # Else DeepSpeed keeps all of so small a model whole.
    config.write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    one_host, run_dir = new_run(prepared, "one_host"), new_run(prepared, "two_hosts")
    codes, said = train(tiny_recipe, one_host, *OPTIONS, ranks=2)
    assert codes == [0, 0], said
    script = [*training(tiny_recipe, run_dir), "--deepspeed_config", str(config)]

    with launched(hosts, "deepspeed", script, tmp_path / "first") as commands:
        wait_for("checkpoint ", tmp_path / "first" / "0", commands[0])
        kill_host(hosts[0])
        exit_code = commands[1].wait(timeout=120)
    said = (tmp_path / "first" / "1").read_text()
    assert exit_code == 1, said
    assert "error: lost contact with another rank (" in said
    assert "run the same command again to continue from the newest checkpoint" in said
    assert "Traceback" not in said
    (*_, newest) = list_checkpoints(run_dir / "checkpoints")
    assert 0 < newest.step < STEPS

    with launched(hosts, "torchrun", script, tmp_path / "second") as commands:
        exit_codes = [command.wait(timeout=240) for command in commands]
    said = (tmp_path / "second" / "0").read_text()
    assert exit_codes == [0, 0], said
    assert f"resumed from {newest.folder}" in said
    assert tracked(run_dir, "train_loss") == pytest.approx(
        tracked(one_host, "train_loss"), rel=1e-5
    )
    expected = weights(one_host)
    for name, tensor in weights(run_dir).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


# The tasks on this machine; a signal to a job step reaches the tasks, and no other process.
SRUN = """#!/usr/bin/env bash
tasks=$SLURM_NTASKS
while [[ $1 == -* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
for ((task = 0; task < tasks; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  echo $! >> "$TASKS"
done
worst=0
for task in $(jobs -p); do
  wait "$task" || { status=$?; worst=$((status > worst ? status : worst)); }
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "requeued job $2" ;;
esac
"""


def test_slurm_job_stops_before_its_time_is_over_and_queues_again(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    """The batch file runs with a `srun` and a `scontrol` of ours: there is no Slurm here."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run_dir = new_run(prepared, "slurm")
    _, *arguments = training(tiny_recipe, run_dir)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "TASKS": str(tmp_path / "tasks"),
    }
    log = tmp_path / "slurm.log"
    with log.open("wb") as output:
        job = subprocess.Popen(
            [
                "bash",
                str(ROOT / "docs" / "slurm.sbatch"),
                *arguments,
                "--training.max_steps",
                "400",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
    wait_for("step 2/", log, job)
    for pid in (tmp_path / "tasks").read_text().split()[-2:]:
        os.kill(int(pid), signal.SIGTERM)
    assert job.wait(timeout=120) == 75, log.read_text()
    (*_, stopped) = list_checkpoints(run_dir / "checkpoints")
    assert f"stopped by a signal at step {stopped.step}" in log.read_text()
    assert log.read_text().endswith("requeued job 4711\n")
