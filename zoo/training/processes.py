"""The processes that train together: Accelerate's."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from zoo.errors import TrainingError
from zoo.model import Model


def processes(model: Model) -> PartialState:
    """Which process this is, of how many; one that torchrun or `accelerate launch` started joins
    the others here, over gloo where its model is on the CPU.

    Raises TrainingError for a model on another process' device, and where Accelerate was asked
    before and took the process for one by itself.
    """
    # A cluster may set WORLD_SIZE for every container; what starts processes numbers them here.
    started = int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("LOCAL_RANK") else 1
    if started == 1:
        return PartialState()
    # Unless it is told, Accelerate takes a process without a GPU for one by itself.
    cpu = model.device.type == "cpu"
    state = PartialState(cpu=cpu)
    if state.num_processes == 1:
        raise TrainingError(
            f"{started} processes were started, and Accelerate took this one for one by itself "
            f"before zoo asked; write accelerate.PartialState({'cpu=True' if cpu else ''}) at the "
            "top of the script, or leave what asks Accelerate out")
    device = torch.device(state.device)
    if (model.device.type, model.device.index or 0) != (device.type, device.index or 0):
        raise TrainingError(f"process {state.process_index} has the device {device}, and its model "
                            f"is on {model.device}; move it there: model.to({str(device)!r})")
    return state
