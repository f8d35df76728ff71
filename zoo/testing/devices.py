"""The devices that checks run on."""

from __future__ import annotations

import torch


def devices() -> list[torch.device]:
    """The CPU and, where there is one, the accelerator of this machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = [torch.device("cpu")]
    return found if accelerator is None else [*found, accelerator]
