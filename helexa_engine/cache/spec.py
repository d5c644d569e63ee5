"""What a layer needs to remember between steps, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import InvalidRequest

if TYPE_CHECKING:
    import torch

PAGE_SIZE = 64  # tokens; also the block of the attention's online softmax and the border of prefill chunks

KvDtype = Literal["float32", "float16", "bfloat16", "q8_0"]
#: What keys and values may be stored as, by the type of the device that the pages lie on. The first is the most exact.
KV_DTYPES: Mapping[str, tuple[KvDtype, ...]] = {
    "cpu": ("float32", "float16", "q8_0"),
    "cuda": ("bfloat16", "q8_0"),
}


class Zeros(Protocol):
    """``torch.zeros``, or what takes the memory from elsewhere."""

    def __call__(self, *shape: int, dtype: torch.dtype = ...) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class AttentionCacheSpec:
    """Keys and values of one attention layer, in pages of :data:`PAGE_SIZE` tokens.

    Attributes:
        device: type of the device that the pages lie on, ``"cpu"`` or ``"cuda"``: it decides how a page is laid out.

    Raises:
        InvalidRequest: a dtype that the device's kernels do not read, or ``q8_0`` with a head dimension that blocks of 32 do not
            fill.
    """

    num_kv_heads: int
    head_dim: int
    dtype: KvDtype
    page_size: int = PAGE_SIZE
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = KV_DTYPES[self.device]
        if self.dtype not in known:
            raise InvalidRequest(
                "kv_dtype", f"keys and values on {self.device} are stored as {' or '.join(known)}, not as {self.dtype}"
            )
        if self.dtype == "q8_0" and self.head_dim % 32:
            other = "bfloat16" if self.device == "cuda" else "float16"
            raise InvalidRequest(
                "kv_dtype",
                f"q8_0 needs heads of a multiple of 32 dimensions, the model's have {self.head_dim}; take {other}",
            )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        values = self.num_kv_heads * self.page_size * self.head_dim
        if self.dtype == "q8_0":
            return 2 * values // 32 * 34  # a block of 32 and its scale
        return 2 * values * (4 if self.dtype == "float32" else 2)

    def allocate(self, num_pages: int, zeros: Zeros | None = None) -> AttentionCache:
        """Zeroed keys and values of ``num_pages`` pages, as ``ops/paged_attention/reference.py`` lays them out for the device.

        ``zeros`` says where they lie; without it, in this machine's memory.
        """
        import torch

        zeros = zeros or torch.zeros
        pages = (num_pages, self.num_kv_heads)
        if self.device == "cuda":
            dtype = torch.int8 if self.dtype == "q8_0" else torch.bfloat16
            rows = (
                self.page_size // 16 * 17 if self.dtype == "q8_0" else self.page_size
            )  # 16 rows' scales fill one more
            return AttentionCache(*(zeros(*pages, rows, self.head_dim, dtype=dtype) for _ in range(2)))
        if self.dtype == "q8_0":
            page = self.page_size * self.head_dim // 32 * 34
            return AttentionCache(*(zeros(*pages, page, dtype=torch.int8) for _ in range(2)))
        dtype = getattr(torch, self.dtype)
        return AttentionCache(
            zeros(*pages, self.head_dim, self.page_size, dtype=dtype),
            zeros(*pages, self.page_size, self.head_dim, dtype=dtype),
        )


@dataclass(slots=True)
class AttentionCache:
    """Keys and values of the pages of one layer, blocks of q8_0 (32 dimensions and a float16 scale) as planes of codes and scales.

    On the CPU ``k`` [num_pages, num_kv_heads, head_dim, page_size] and ``v`` [.., page_size, head_dim], float16 or float32; q8_0:
    int8 [num_pages, num_kv_heads, page_size * head_dim / 32 * 34]. On CUDA both [num_pages, num_kv_heads, page_size, head_dim]
    bfloat16; q8_0: int8 [.., page_size + page_size / 16, head_dim], a row of codes for each token, then all scales.
    """

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class StateCacheSpec:
    """The states of one gated delta net layer: a slot for each running sequence and for each snapshot, whatever its length.

    States are float32: rounding them from token to token drifts.
    """

    conv_channels: int
    conv_kernel: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, both states."""
        conv = (self.conv_kernel - 1) * self.conv_channels
        return 4 * (conv + self.num_v_heads * self.head_k_dim * self.head_v_dim)

    def allocate(self, num_slots: int, zeros: Zeros | None = None) -> StateCache:
        """Zeroed states of ``num_slots`` slots."""
        import torch

        zeros = zeros or torch.zeros
        return StateCache(
            zeros(num_slots, self.conv_kernel - 1, self.conv_channels),
            zeros(num_slots, self.num_v_heads, self.head_k_dim, self.head_v_dim),
        )


@dataclass(slots=True)
class StateCache:
    """What a gated delta net layer remembers of each slot, float32.

    Attributes:
        conv_state: [num_slots, conv_kernel - 1, conv_channels], the convolution's last inputs, oldest first.
        recurrent_state: [num_slots, num_v_heads, head_k_dim, head_v_dim].
    """

    conv_state: torch.Tensor
    recurrent_state: torch.Tensor

    def clear(self, slots: Sequence[int]) -> None:
        """The state of a sequence that has not begun."""
        for slot in slots:
            self.conv_state[slot].zero_()
            self.recurrent_state[slot].zero_()

    def copy(self, source: int, target: int) -> None:
        """What slot ``source`` remembers, into slot ``target`` as well."""
        self.conv_state[target].copy_(self.conv_state[source])
        self.recurrent_state[target].copy_(self.recurrent_state[source])


CacheSpec = AttentionCacheSpec | StateCacheSpec
LayerCache = AttentionCache | StateCache
