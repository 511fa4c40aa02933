"""What there is to compute with."""

from __future__ import annotations

import platform

import torch


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bf16_in_hardware() -> bool:
    """Whether the processor multiplies in bfloat16; PyTorch's own answer is yes for any AVX-512, which emulates it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not on_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
