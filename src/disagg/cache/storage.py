"""The tensor the KV cache lives in: pages, each one contiguous range of bytes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from disagg.errors import InvariantError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class KVStorage:
    """`pages` [num_pages, num_layers, 2 (K, V), num_kv_heads, page_size, head_dim] over memory owned here or elsewhere.

    Page-major: all layers' keys and values of a page lie together, so page i is the bytes
    i * page_bytes : (i + 1) * page_bytes of the buffer, and a hand-off is a list of page numbers.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        num_pages: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        buffer: Any = None,
    ) -> None:
        """With `buffer` (any writable buffer on the CPU or a tensor of bytes, for example a transport's `pages`), the
        pages are its bytes, where it is, and `num_pages` follows from its length unless given. Raises InvariantError
        when the two do not fit."""
        self.page_size = page_size
        self._shape = (num_layers, 2, num_kv_heads, page_size, head_dim)
        self._dtype = dtype
        element = _DTYPES[dtype]
        self.page_bytes = int(np.prod(self._shape)) * element.itemsize
        if buffer is None:
            if num_pages is None:
                raise InvariantError("KVStorage needs num_pages or a buffer.")
            self.pages = torch.zeros((num_pages, *self._shape), dtype=element, device=device)
            self.num_pages = num_pages
            return
        raw = buffer if isinstance(buffer, Tensor) else torch.from_numpy(np.asarray(memoryview(buffer).cast("B")))
        raw = raw.view(-1)
        self.num_pages = len(raw) // self.page_bytes if num_pages is None else num_pages
        if len(raw) < self.num_pages * self.page_bytes:
            need = f"{self.num_pages} pages of {self.page_bytes} bytes"
            raise InvariantError(f"A buffer of {len(raw)} bytes cannot hold {need}.")
        self.pages = raw[: self.num_pages * self.page_bytes].view(element).view(self.num_pages, *self._shape)

    def layout(self) -> dict[str, Any]:
        """What a page means, for `transfer.layout.Layout(model=..., **storage.layout())`."""
        num_layers, _, num_kv_heads, page_size, head_dim = self._shape
        return {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "page_size": page_size,
            "head_dim": head_dim,
            "dtype": self._dtype,
        }
