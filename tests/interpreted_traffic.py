"""Bytes that Triton kernels load and store in the interpreter, and how many are launched: counted, not computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter

from fastlocal.bench.count import Traffic


def count_kernels(function: Callable[[], object], monkeypatch: Any) -> Traffic:
    """Run `function` once; elements behind a false mask are not counted."""
    traffic = Traffic()
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    launch = interpreter.GridExecutor.__call__

    def num_bytes(pointers: Any, mask: Any) -> int:
        return int(np.count_nonzero(mask.data)) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.bytes_read += num_bytes(pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.bytes_written += num_bytes(pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_launch(self: Any, *arguments: Any, **constants: Any) -> Any:
        traffic.launches += 1
        return launch(self, *arguments, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(interpreter.GridExecutor, "__call__", counted_launch)
        function()
    return traffic
