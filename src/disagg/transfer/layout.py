"""What is being moved, as data two workers compare before the first page travels."""

import msgspec

PROTOCOL_VERSION = 2  # raise with every change to cluster/messages.py that an older peer would misread


class Layout(msgspec.Struct, frozen=True):
    """One page's meaning: [num_layers, 2 (K, V), num_kv_heads, page_size, head_dim] of `dtype`, contiguous.

    `model` fingerprints configuration and weights: equal text means the same numbers.
    """

    model: str
    num_layers: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: str
    protocol: int = PROTOCOL_VERSION

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
        return self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim * sizes[self.dtype]

    def difference(self, other: "Layout") -> str:
        """What differs from `other`, as words for an error sentence; empty when pages can be exchanged."""
        parts = []
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                parts.append(f"{name} ({mine} here, {theirs} there)")
        return ", ".join(parts)
