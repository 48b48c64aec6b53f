"""Attention of decodes with heads of 128 channels, for which Hopper GPUs have a kernel, against float32."""

from dataclasses import replace

import pytest
import torch
from ops_cuda_data import BOUNDS, DEVICE, assert_close, draw, on_device
from ops_data import make_step

from disagg.model.decoder import rope_tables
from disagg.model.ops import ReferenceOps, Step
from disagg.model.spec import RopeSpec

pytest.importorskip("triton")

from disagg.model.ops_cuda_decode import DecodeTile, Fused, attend_decodes, decode_tile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
REFERENCE = ReferenceOps()
KINDS = [  # each is a kernel to compile
    ((32, 8), 16, torch.bfloat16), ((32, 8), 32, torch.bfloat16), ((32, 8), 64, torch.float16),
    ((8, 8), 16, torch.bfloat16), ((28, 4), 16, torch.float16), ((16, 1), 16, torch.bfloat16),
]  # fmt: skip
LENGTHS = {
    "short": [1, 2, 3, 16, 17, 31, 32, 33, 48],
    "one": [777],
    "few": [1, 4000, 64, 65, 300, 1023],
    "many": [1 + 37 * index % 1100 for index in range(150)],
    "hundreds": [1 + index % 40 for index in range(300)],
}


def padded(step: Step) -> Step:
    """With three sequences more, of context 0."""
    context_len, table = step.context_len, step.page_table
    return replace(
        step, context_len=torch.cat([context_len, context_len.new_zeros(3)]),
        page_table=torch.cat([table, table.new_zeros(3, table.shape[1])]),
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "page_size", "dtype"), KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_step_of_decodes(lengths: list[int], heads: tuple[int, int], page_size: int, dtype: torch.dtype) -> None:
    """Norm, rotation, page write and attention, also of rows of padding; another layer's pages stay as they were."""
    (num_heads, num_kv), size = heads, 128
    step, num_pages = make_step([(1, length) for length in lengths], page_size)
    step = on_device(step, max_query_len=1, max_context_len=4096)
    qkv = draw(len(lengths), (num_heads + 2 * num_kv) * size, dtype=dtype)
    pages = draw(num_pages, 2, 2, num_kv, page_size, size, dtype=dtype)
    rope = rope_tables(RopeSpec(theta=1e6), size, max(lengths), DEVICE)
    norms = [draw(size, dtype=dtype) for _ in range(2)]
    wide = pages.to(torch.float32, copy=True)
    q = REFERENCE.rotate_and_store(qkv.float(), step, 1, wide, rope, *(norm.float() for norm in norms), 1e-6)
    expected = REFERENCE.attend(q, 1, wide, step, 0.1)
    wider = torch.cat([qkv, draw(3, qkv.shape[1], dtype=dtype)])
    fused = Fused(rope, *norms, 1e-6)
    for _ in range(2):  # counters are as they were
        written = pages.clone()
        out = torch.full((len(wider), num_heads * size), float("nan"), dtype=dtype, device=DEVICE)
        attend_decodes(wider, 1, written, padded(step), 0.1, out, len(wider), fused)
        assert_close(out[: len(lengths)], expected, BOUNDS[dtype])
        assert (out[len(lengths) :] == 0).all()
        assert_close(written, wide, BOUNDS[dtype])
        assert torch.equal(written[:, 0], pages[:, 0])


@pytest.mark.parametrize("heads", [(32, 8), (16, 8)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_keys_and_values_that_are_there(lengths: list[int], heads: tuple[int, int]) -> None:
    """Without norm, rotation and page write, as beside chunks, padding too; alike with the kernel for any GPU."""
    (num_heads, num_kv), size, dtype = heads, 128, torch.bfloat16
    step, num_pages = make_step([(1, length) for length in lengths], 16)
    step = on_device(step, max_query_len=1, max_context_len=4096)
    pages = draw(num_pages, 2, 2, num_kv, 16, size, dtype=dtype)
    q, count = draw(len(lengths) + 3, num_heads, size, dtype=dtype), len(lengths) + 3
    expected = REFERENCE.attend(q[:-3].float(), 1, pages.float(), step, 0.1)
    for tile in (decode_tile(pages, num_heads // num_kv, count), DecodeTile(32, 2, 1024, 396)):
        out = torch.full((count, num_heads * size), float("nan"), dtype=dtype, device=DEVICE)
        attend_decodes(q, 1, pages, padded(step), 0.1, out, count, tile=tile)
        assert_close(out[:-3], expected, BOUNDS[dtype])
        assert (out[-3:] == 0).all()


def test_hopper_gpus_take_their_own_kernel() -> None:
    """For heads of 128 and pages of 16 and 32 positions; otherwise the tests above say nothing of it."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for page_size, size in ((16, 128), (32, 128), (64, 128), (16, 64)):
        pages = draw(1, 1, 2, 2, page_size, size, dtype=torch.bfloat16)
        for count in (1, 39, 40, 256):
            assert bool(decode_tile(pages, 4, count).stages) is (hopper and size == 128 and page_size < 64)
