"""Log how busy the machine is while rank 0 trains (MLflow shows it as System metrics)."""

# `_create_monitors` imports mlflow itself, in its own thread: that takes seconds.

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.tracking.mlflow_records import IMPORT_LOCK
from pipeline.tracking.tracker import Tracker

SAMPLING_SECONDS = 10.0  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL has another value


@contextmanager
def system_metrics(tracker: Tracker, current_step: Callable[[], int]) -> Iterator[None]:
    """Log what MLflow's monitors of CPU, memory, disk, network and GPUs say, meanwhile.

    That goes through our tracker, so that none is lost while the server is away. They see the
    machine of rank 0.

    :param current_step: tells which training step a sample belongs to.
    """
    ended = threading.Event()

    def log_samples() -> None:
        seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLING_SECONDS))
        monitors = _create_monitors()
        while not ended.wait(seconds):
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            metrics = {f"system/{key}": value for key, value in metrics.items()}
            tracker.log_metrics(metrics, current_step())

    thread = threading.Thread(target=log_samples, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _create_monitors() -> list[Any]:
    with IMPORT_LOCK:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(RuntimeError):  # GPUMonitor's, where there is no GPU
            monitors.append(kind())
    return monitors
