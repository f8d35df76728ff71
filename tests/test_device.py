from __future__ import annotations

import pytest
import torch

from zoo.device import resolve_device, resolve_dtype
from zoo.errors import DeviceError, OptionError


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize("given", ["auto", None])
def test_auto_is_the_accelerator(two_gpus: None, given: str | None) -> None:
    assert resolve_device(given) == torch.device("cuda")


@pytest.mark.parametrize("given", ["auto", None])
def test_auto_is_the_cpu_where_there_is_no_accelerator(cpu_only: None, given: str | None) -> None:
    assert resolve_device(given) == torch.device("cpu")


@pytest.mark.parametrize("given", ["cpu", "cuda", "cuda:1", torch.device("cuda", 0)])
def test_torch_spellings_stay_as_they_are(two_gpus: None, given: str | torch.device) -> None:
    assert resolve_device(given) == torch.device(given)


@pytest.mark.parametrize(("given", "message"), [
    ("cdua", "'cdua' is no device; did you mean 'cuda'?; this machine has cpu, and 'auto' takes "
             "the best of them"),
    ("CUDA:0", "'CUDA:0' is no device; did you mean 'cuda'?; this machine has cpu"),
    ("gpu", "'gpu' is no device; did you mean 'auto'?; this machine has cpu"),
    ("", "'' is no device; this machine has cpu"),
    ("cpu:1", "the device 'cpu:1' is not here; this machine has cpu"),
    ("cuda", "the device 'cuda' is not here; this machine has cpu, and 'auto' takes the best of"),
    (torch.device("mps"), "the device 'mps' is not here; this machine has cpu"),
    ("meta", "the device 'meta' holds no numbers to compute with; this machine has cpu"),
])
def test_what_cannot_run_here_says_what_can(
    cpu_only: None, given: str | torch.device, message: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device(given)
    assert str(caught.value).startswith(message)


def test_an_index_out_of_range_lists_the_devices(two_gpus: None) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device("cuda:2")
    assert str(caught.value).startswith(
        "the device 'cuda:2' is not here; this machine has cpu, cuda:0, cuda:1, and 'auto'")


@pytest.mark.parametrize(("given", "dtype"), [
    (None, torch.float32), ("float32", torch.float32), ("fp16", torch.float16),
    ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.float64", torch.float64),
    (torch.float16, torch.float16),
])
def test_dtype_spellings(given: str | torch.dtype | None, dtype: torch.dtype) -> None:
    assert resolve_dtype(given) is dtype


@pytest.mark.parametrize(("given", "message"), [
    ("bfloat61", "dtype: 'bfloat61' is no floating type; did you mean 'bfloat16'?; its options "
                 "are float32, fp32, float16"),
    (torch.int64, "dtype: 'torch.int64' is no floating type"),
])
def test_other_dtypes_are_refused(given: str | torch.dtype, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_dtype(given)
    assert str(caught.value).startswith(message)
