"""What a layer needs to remember between steps, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PAGE_SIZE = 64  # tokens; also the block of the attention's online softmax and the border of prefill chunks

KvDtype = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class AttentionCacheSpec:
    """Keys and values of one attention layer, in pages of :data:`PAGE_SIZE` tokens."""

    num_kv_heads: int
    head_dim: int
    dtype: KvDtype
    page_size: int = PAGE_SIZE

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * (4 if self.dtype == "float32" else 2)

    def allocate(self, num_pages: int) -> LayerCache:
        """Zeroed keys and values [num_pages, num_kv_heads, page_size, head_dim]."""
        import torch

        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


@dataclass(slots=True)
class LayerCache:
    """``k`` and ``v``: [num_pages, num_kv_heads, page_size, head_dim], float16 or float32."""

    k: torch.Tensor
    v: torch.Tensor
