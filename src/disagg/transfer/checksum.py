"""One number per page, to notice bytes that changed on the way. Off unless `EngineSpec.checksum` asks for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash


def page_checksums(pages: Any) -> Callable[[list[int]], list[int]]:
    """A function from page numbers to checksums (XXH3, 64 bits), over `pages` uint8 [num_pages, page_bytes].

    `pages` is a transport's: an array, or a tensor on a GPU, whose pages are copied to the host to be summed.

    It reads the memory as it is when called: the prefill worker calls it when a page is complete, the decode worker
    when its copy has ended. Both must read the same bytes, so a page is summed whole, unused positions included.
    """

    def checksums(numbers: list[int]) -> list[int]:
        here = pages if isinstance(pages, np.ndarray) else pages[numbers].cpu().numpy()
        rows = numbers if here is pages else range(len(numbers))
        return [xxhash.xxh3_64_intdigest(here[row]) for row in rows]

    return checksums
