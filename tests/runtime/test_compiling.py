"""Code that cannot be compiled is a warning, and plain code runs instead."""

from __future__ import annotations

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from permllm import errors
from permllm.runtime.compiling import compiled, with_fallback


@pytest.mark.usefixtures("kernels_may_fail")
def test_a_failure_is_one_warning_and_plain_code(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(value: int) -> int:
        calls.append(value)
        if value == 2:
            raise RuntimeError("no driver\nand a long story")
        return value

    attempt = with_fallback(broken, "slower without")
    assert [attempt(1), attempt(2), attempt(3)] == [1, None, None]
    assert calls == [1, 2]
    assert caplog.messages == ["slower without: no driver"]
    monkeypatch.setattr(torch, "compile", Mock(return_value=broken))
    assert compiled(lambda value: 3 * value, "slower without")(2) == 6
    full = with_fallback(Mock(side_effect=torch.OutOfMemoryError()), "slower without")
    with pytest.raises(torch.OutOfMemoryError):  # which is not hidden
        full()


def test_a_failure_is_raised_for_somebody_who_wants_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("permllm.runtime.compiling.tracebacks_wanted", errors.tracebacks_wanted)
    monkeypatch.delenv(errors.SHORT_ERRORS, raising=False)
    failing = Mock(side_effect=RuntimeError("a defect of the kernel"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert with_fallback(failing, "slower without")() is None
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError):
        with_fallback(failing, "slower without")()


def test_equal_sizes_are_no_reason_to_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CompileCounter()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))

    def rows(values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(0, index) + 1

    run = compiled(rows, "slower without")
    for shape, count in (((6, 6), 6), ((6, 9), 4), ((8, 5), 8)):
        run(torch.ones(shape), torch.arange(count))
    assert counted.frame_count == 1
