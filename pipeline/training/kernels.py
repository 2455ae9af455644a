"""Which of torch's kernels training takes, where they differ in speed."""

from __future__ import annotations

import torch


def choose_kernels(device: torch.device, computes_in: str) -> None:
    """Choose, for the whole process.

    :param computes_in: `bf16`, `fp16` or `fp32`.
    """
    torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 on a GPU takes its fast units
    # The switch is a CPU's, too. There the gradient of fused attention takes several times as long
    # in bf16 as products and softmax one by one, up to some 200 positions.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or computes_in == "fp32")
