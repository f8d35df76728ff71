"""From a user's spelling to one torch device and one floating type."""

from __future__ import annotations

import torch

from zoo.errors import DeviceError, OptionError
from zoo.names import suggest

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float64": torch.float64, "fp64": torch.float64,
}
# The kinds torch.accelerator can answer for; a misspelling is compared with these.
_KINDS = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "mtia")


def resolve_device(given: str | torch.device | None = "auto") -> torch.device:
    """The device to run on.

    given: `"auto"` or None for the accelerator of this machine (cuda, mps, xpu, …) and the CPU
    where there is none; or any spelling of torch's, `"cuda:1"`.

    Raises DeviceError when it is misspelt, is not on this machine, or holds no numbers (`meta`).
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if given is None or given == "auto":
        return accelerator or torch.device("cpu")
    count = {"cpu": 1}
    if accelerator is not None:
        count[accelerator.type] = torch.accelerator.device_count()
    names = ", ".join(kind if kind == "cpu" else f"{kind}:{index}"
                      for kind, n in count.items() for index in range(n))
    there = f"this machine has {names}, and 'auto' takes the best of them"
    try:
        device = torch.device(str(given))
    except RuntimeError:
        raise DeviceError(f"{given!r} is no device{_nearest(str(given))}; {there}") from None
    if device.type == "meta":
        raise DeviceError(f"the device 'meta' holds no numbers to compute with; {there}")
    if (device.index or 0) >= count.get(device.type, 0):
        raise DeviceError(f"the device {str(given)!r} is not here; {there}")
    return device


def resolve_dtype(given: str | torch.dtype | None = None) -> torch.dtype:
    """The floating type to compute in.

    given: a torch floating type or its name (`"bfloat16"`, `"bf16"`, `"fp16"`, …); None is float32.

    Raises OptionError for anything else.
    """
    if given is None:
        return torch.float32
    dtype = _DTYPES.get(str(given).removeprefix("torch."))
    if dtype is None:
        near = suggest(str(given), _DTYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError("dtype", f"{str(given)!r} is no floating type{hint}", _DTYPES)
    return dtype


def _nearest(given: str) -> str:
    kind = given.partition(":")[0]
    # Its nearest spelling is 'cpu', which is the opposite of what is meant.
    near = ["auto"] if kind.lower() == "gpu" else suggest(kind, _KINDS, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
