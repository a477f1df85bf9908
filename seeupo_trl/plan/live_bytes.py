"""Counts the bytes of live tensors, exactly; those of `FakeTensorMode` count for what they would be with data."""

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """
    Context in which the bytes of all tensors that come into being are counted until they are freed.

    Storages are counted, so views are free; tensors on the `meta` device are not counted. Backward passes are
    followed, too, and storages that are resized, as FSDP2 does. What an operator allocates and frees inside itself is
    not seen.

    Attributes:
        live (`int`):
            Bytes of the tensors that are alive.
        peak (`int`):
            Largest `live` since the start, or since [`reset_peak`].

    Example:

    ```python
    >>> with LiveBytes() as memory:
    ...     loss = model(input_ids).logits.sum()
    >>> memory.peak
    ```
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "LiveBytes":
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if storage.device.type != "meta":
                self._count_storage(storage)
            return result

        # resizing is not an operator
        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exc_info)

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor that is older than the context; it is counted once."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type != "meta":
            self._count_storage(tensor.untyped_storage())

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._forget, key).atexit = False
        if known != size:
            self._sizes[key] = size
            self.live += size - (known or 0)
            self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Look for the peak anew."""
        self.peak = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return output
