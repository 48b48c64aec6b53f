"""The seam `Ops`: CpuOps, storing float32 and float16, computes what ReferenceOps defines.

Bounds, relative to the largest number of the result: float32 5e-6 for one operation and 2e-5 for a stack (another
order of summation). float16 gets the reference weights rounded to float16, so it owes the same bounds: only storage
is narrower, never arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from ops_data import MIXED, make_rope, make_step
from torch import Tensor

from disagg.model.ops import LayerWeights, Ops, ReferenceOps, Step, compose_decoder, pick_ops

pytest.importorskip("numba")

REFERENCE = ReferenceOps()
ONE_OP, STACK = 5e-6, 2e-5
DTYPES = [torch.float32, torch.float16]
HEADS = [(9, 3, 64), (8, 8, 64), (14, 2, 16), (4, 2, 32)]  # query heads, key heads, head size


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make_layer(hidden: int, heads: tuple[int, int, int], width: int, extras: bool) -> LayerWeights:
    """Random weights that float16 holds exactly, so that both storages mean the same numbers."""
    num_heads, num_kv, size = heads

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape) / shape[-1] ** 0.5).half().float()

    qkv = (num_heads + 2 * num_kv) * size
    layer = LayerWeights(
        torch.rand(hidden) + 0.5, weight(qkv, hidden), weight(hidden, num_heads * size),
        torch.rand(hidden) + 0.5, weight(2 * width, hidden), weight(hidden, width),
    )  # fmt: skip
    if not extras:
        return layer
    return replace(layer, qkv_bias=torch.randn(qkv), q_norm=torch.rand(size) + 0.5, k_norm=torch.rand(size) + 0.5)


def assert_close(ours: Tensor, expected: Tensor, bound: float) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (960, 576), (33, 17), (7, 5), (100, 1536)])
def test_linear_is_the_product_for_any_shape(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """x @ weight.T + bias, for 1 to 300 rows and for sizes that fill no panel."""
    weight, bias = torch.randn(shape).half().float(), torch.randn(shape[0])
    for rows in [*range(1, 14), 70, 300]:
        x = torch.randn(rows, shape[1])
        for b in (None, bias):
            assert_close(pick_ops("cpu", dtype).linear(weight, b)(x), REFERENCE.linear(weight, b)(x), ONE_OP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """A row's result does not depend on the rows beside it: greedy tokens do not change with the batch."""
    linear, x = pick_ops("cpu", dtype).linear(torch.randn(200, 96)), torch.randn(70, 96)
    whole = linear(x)
    for rows in range(1, 70):
        assert torch.equal(linear(x[:rows]), whole[:rows])


def test_linear_refuses_weights_that_float16_cannot_hold() -> None:
    """A weight beyond 65504 would become infinite; that is an error, not a result."""
    with pytest.raises(ValueError, match="float32"):
        pick_ops("cpu", torch.float16).linear(torch.full((4, 4), 1e6))


@pytest.mark.parametrize("rows", [1, 2, 7, 70])
@pytest.mark.parametrize("width", [576, 20, 3])
def test_norm_and_silu(rows: int, width: int) -> None:
    """add_rms_norm returns the norm of the sum and the sum itself; silu_mul is silu of one half times the other."""
    ops, x, weight = pick_ops("cpu"), torch.randn(rows, 2 * width) * 8, torch.rand(2 * width)
    for residual in (None, torch.randn(rows, 2 * width)):
        ours, expected = (o.add_rms_norm(x, residual, weight, 1e-5) for o in (ops, REFERENCE))
        assert_close(ours[0], expected[0], ONE_OP)
        assert torch.equal(ours[1], expected[1])
    assert_close(ops.silu_mul(x), REFERENCE.silu_mul(x), ONE_OP)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [1, 16, 20])
def test_rotate_and_store(heads: tuple[int, int, int], page_size: int, norms: bool, rotary: bool) -> None:
    """q comes back normed and rotated, k and v are in their slots, and no other number of the pages changed."""
    num_heads, num_kv, size = heads
    step, num_pages = make_step(MIXED, page_size)
    qkv = torch.randn(len(step.tokens), (num_heads + 2 * num_kv) * size)
    rope, weights = make_rope(size) if rotary else None, (torch.rand(size), torch.rand(size)) if norms else (None, None)
    pages = torch.randn(num_pages, 2, 2, num_kv, page_size, size)
    copies = pages.clone(), pages.clone()
    q, expected = (
        ops.rotate_and_store(qkv, step, 1, copy, rope, *weights, 1e-6)
        for ops, copy in zip((pick_ops("cpu"), REFERENCE), copies, strict=True)
    )
    assert_close(q, expected, ONE_OP)
    assert_close(*copies, ONE_OP)
    assert torch.equal(copies[0][:, 0], pages[:, 0])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [1, 16, 20, 64])
@pytest.mark.parametrize("sequences", [MIXED, [(1, n) for n in (1, 2, 63, 64, 65, 130)], [(150, 150)]])
def test_attend(heads: tuple[int, int, int], page_size: int, sequences: list[tuple[int, int]]) -> None:
    """Causal attention over shuffled pages, for decodes, chunks and both in one step."""
    num_heads, num_kv, size = heads
    step, num_pages = make_step(sequences, page_size)
    pages, q = torch.randn(num_pages, 2, 2, num_kv, page_size, size), torch.randn(len(step.tokens), num_heads, size)
    ours, expected = (ops.attend(q, 1, pages, step, size**-0.5) for ops in (pick_ops("cpu"), REFERENCE))
    assert_close(ours, expected, ONE_OP)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False], ids=["qwen", "llama"])
@pytest.mark.parametrize(("hidden", "width"), [(96, 160), (90, 50)])
def test_decoder_is_what_compose_decoder_defines(dtype: torch.dtype, extras: bool, hidden: int, width: int) -> None:
    """Three layers over a mixed step, by one call and by single operations, equal the reference; so do the pages."""
    heads = (6, 2, 16)
    layers, rope = [make_layer(hidden, heads, width, extras) for _ in range(3)], make_rope(16)
    step, num_pages = make_step(MIXED, 16)
    x, pages = torch.randn(len(step.tokens), hidden), torch.randn(num_pages, 3, 2, 2, 16, 16)
    ops: Ops = pick_ops("cpu", dtype)
    pages_expected = pages.clone()
    expected = REFERENCE.decoder(layers, rope, 1e-5)(x, step, pages_expected)
    for decoder in (ops.decoder(layers, rope, 1e-5), compose_decoder(ops, layers, rope, 1e-5)):
        written, before = pages.clone(), x.clone()
        assert_close(decoder(x, step, written), expected, STACK)
        assert_close(written, pages_expected, STACK)
        assert torch.equal(x, before)


@pytest.mark.parametrize("ops", [REFERENCE, pick_ops("cpu"), pick_ops("cpu", torch.float16)])
@pytest.mark.parametrize("composed", [False, True])
def test_a_stack_layer_by_layer_has_the_same_bits(ops: Ops, composed: bool) -> None:
    """A range of layers after the other, of any lengths, gives the hidden states and pages of one call."""
    layers, rope = [make_layer(96, (6, 2, 16), 160, True) for _ in range(4)], make_rope(16)
    step, num_pages = make_step(MIXED, 16)
    x, pages = torch.randn(len(step.tokens), 96), torch.randn(num_pages, 4, 2, 2, 16, 16)
    decoder = compose_decoder(ops, layers, rope, 1e-5) if composed else ops.decoder(layers, rope, 1e-5)
    at_once = pages.clone()
    expected = decoder(x, step, at_once)
    for cuts in ((0, 1, 2, 3, 4), (0, 3, 4), (0, 2, 4)):
        written, hidden = pages.clone(), x
        for start, stop in pairwise(cuts):
            hidden = decoder(hidden, step, written, range(start, stop))
        assert torch.equal(hidden, expected)
        assert torch.equal(written, at_once)


def test_decoded_token_has_the_same_bits_in_any_batch() -> None:
    """A decode row's hidden state does not depend on the other sequences of the step, whatever they do."""
    layers, rope = [make_layer(96, (6, 2, 16), 160, False) for _ in range(2)], make_rope(16)
    step, num_pages = make_step(MIXED, 16)
    x, pages = torch.randn(len(step.tokens), 96), torch.randn(num_pages, 2, 2, 2, 16, 16)
    alone = Step(
        step.tokens[:1], step.positions[:1], step.slots[:1], step.query_start[:2], step.context_len[:1],
        step.page_table[:1], step.last[:1],
    )  # fmt: skip
    decoder = pick_ops("cpu").decoder(layers, rope, 1e-5)
    assert torch.equal(decoder(x, step, pages.clone())[:1], decoder(x[:1], alone, pages.clone()))


def test_a_head_that_fills_no_register_is_refused() -> None:
    """Head size 8 is an error that names the way out."""
    step, num_pages = make_step([(1, 4)], 16)
    with pytest.raises(ValueError, match="ReferenceOps"):
        pick_ops("cpu").rotate_and_store(torch.randn(1, 24), step, 0, torch.zeros(num_pages, 1, 2, 1, 16, 8))
