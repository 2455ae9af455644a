"""How busy the machine is, logged while rank 0 trains (MLflow shows it as System metrics)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from pipeline.tracking.mlflow_records import IMPORTING
from pipeline.tracking.tracker import Tracker

SECONDS = 10.0  # MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is MLflow's name for another value


class SystemMetrics:
    """MLflow's own monitors of CPU, memory, disk, network and GPUs, through our tracker: a server
    that is away loses none. They see the machine of rank 0."""

    def __init__(self, tracker: Tracker, step: Callable[[], int]) -> None:
        """:param step: tells the step at hand."""
        self._tracker, self._step = tracker, step
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system metrics", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SECONDS))
        monitors = _monitors()
        while not self._ended.wait(seconds):
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            metrics = {f"system/{key}": value for key, value in metrics.items()}
            self._tracker.log_metrics(metrics, self._step())


def _monitors() -> list[Any]:
    with IMPORTING:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(RuntimeError):  # there is no GPU
            monitors.append(kind())
    return monitors
