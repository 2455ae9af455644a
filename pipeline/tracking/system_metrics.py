"""Log how busy the machine is while rank 0 trains (MLflow shows it as System metrics)."""

# `_create_monitors` imports mlflow itself, in its own thread: that takes seconds.

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from pipeline.tracking.mlflow_records import IMPORT_LOCK
from pipeline.tracking.tracker import Tracker

SAMPLING_SECONDS = 10.0  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL has another value


class SystemMetrics:
    """A context in which MLflow's monitors of CPU, memory, disk, network and GPUs are logged.

    They go through our tracker, so that none are lost while the server is away. They see the
    machine of rank 0.
    """

    def __init__(self, tracker: Tracker, current_step: Callable[[], int]) -> None:
        """Make the thread that logs.

        :param current_step: tells which training step a sample belongs to.
        """
        self._tracker, self._current_step = tracker, current_step
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._log_samples, name="system metrics", daemon=True
        )

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

    def _log_samples(self) -> None:
        seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLING_SECONDS))
        monitors = _create_monitors()
        while not self._ended.wait(seconds):
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            metrics = {f"system/{key}": value for key, value in metrics.items()}
            self._tracker.log_metrics(metrics, self._current_step())


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
