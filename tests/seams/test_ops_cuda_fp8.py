"""The seam `Ops` in eight bits: Fp8Ops computes what Fp8ReferenceOps defines.

The products need a Hopper GPU. Finding scales runs as Python on the CPU where Triton is installed.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ops_cuda_data import DEVICE, ON_GPU, assert_close, draw, make_layer, on_device, rope_on_device, widened
from ops_data import MIXED, make_step

pytest.importorskip("triton")

from disagg.model.fp8 import Fp8ReferenceOps, quantise
from disagg.model.ops import ReferenceOps
from disagg.model.ops_cuda_fp8 import Fp8Ops, quantise_rows, scaled_product

pytestmark = [pytest.mark.gpu] if ON_GPU else [pytest.mark.filterwarnings("ignore:Conversion of an array")]
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)
on_hopper = pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
STEP = 1 / 8  # of a number, between neighbours in e4m3, at most
SUM = 3e-3  # of products: Hopper's tensor cores keep 14 bits of a sum of eight-bit products


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


@pytest.mark.parametrize("size", [48, 4096] if ON_GPU else [48])
@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_rows_are_rounded_as_defined(kind: str, size: int) -> None:
    """Scales are the definition's; a number may fall to the neighbour where the one before rounding differs."""
    x = draw(5, 2 * size if kind == "gated" else size, dtype=torch.bfloat16 if ON_GPU else torch.float16, scale=3)
    x[3] = 0
    norm = draw(size, dtype=x.dtype) if kind == "normed" else None
    wide = x.float()
    if norm is not None:
        wide, _ = ReferenceOps().add_rms_norm(wide, None, norm.float(), 1e-6)
    if kind == "gated":
        wide = ReferenceOps().silu_mul(wide)
    ours, expected = quantise_rows(x, norm, 1e-6, kind == "gated"), quantise(wide)
    assert_close(ours.scale, expected.scale, 1e-6)
    if ON_GPU:  # the interpreter's conversion to e4m3 forgets a carry: 124 becomes 64
        assert (ours.values.float() != expected.values.float()).float().mean() < 0.01
        assert ((ours.plain() - wide).abs() <= STEP * wide.abs() + expected.scale[:, None] * 2**-9).all()


@on_hopper
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 100, 128, 129, 300])
def test_product_is_the_definitions(rows: int) -> None:
    """With and without bias and residual, for tiles of each size, and where there is none."""
    for outputs, inputs in ((48, 80), (48, 64), (1008, 4096), (16_384, 1024), (4096, 12_288), (208, 384)):
        x, weight = (quantise(draw(count, inputs, dtype=torch.bfloat16)) for count in (rows, outputs))
        bias, residual = draw(outputs, dtype=torch.bfloat16), draw(rows, outputs, dtype=torch.bfloat16)
        plain = x.plain() @ weight.plain().T
        assert_close(scaled_product(x, weight), plain, 8e-3)
        before = residual.clone()
        assert_close(scaled_product(x, weight, bias, residual), plain + bias.float() + before.float(), 8e-3)
        assert torch.equal(residual, before)


@on_hopper
def test_sums_of_long_products_keep_their_bits() -> None:
    """All of one sign, so that a sum grows: what a tensor core drops of each addend must stay small."""
    x, weight = (quantise(draw(count, 12_288, dtype=torch.bfloat16).abs()) for count in (16, 256))
    assert_close(scaled_product(x, weight), x.plain() @ weight.plain().T, 8e-3 + SUM)


@on_hopper
@pytest.mark.parametrize("extras", [True, False], ids=["all extras", "llama"])
@pytest.mark.parametrize("sequences", [MIXED, [(1, n) for n in (1, 2, 63, 64, 65, 130, 200)], [(1, 40)]])
def test_decoder_is_what_compose_decoder_defines(sequences: list[tuple[int, int]], extras: bool) -> None:
    """Three layers equal the definition's, up to numbers that fall to a neighbour; and so do the pages."""
    heads, hidden, width = (8, 2, 64), 512, 768
    layers = [make_layer(hidden, heads, width, extras, torch.bfloat16) for _ in range(3)]
    rope = rope_on_device(heads[2])
    step, num_pages = make_step(sequences, 16)
    host = {} if sequences is MIXED else {"max_query_len": 1, "max_context_len": 4096}
    step = on_device(step, **host)
    x = draw(len(step.tokens), hidden, dtype=torch.bfloat16)
    pages = draw(num_pages, 3, 2, heads[1], 16, heads[2], dtype=torch.bfloat16)
    wide = pages.to(torch.float32, copy=True)
    expected = Fp8ReferenceOps().decoder([widened(layer) for layer in layers], rope, 1e-5)(x.float(), step, wide)
    exact_pages = pages.to(torch.float32, copy=True)
    exact = ReferenceOps().decoder([widened(layer) for layer in layers], rope, 1e-5)(x.float(), step, exact_pages)
    ours = Fp8Ops(DEVICE).decoder(layers, rope, 1e-5)(x, step, pages)
    assert_close(ours, expected, 6e-2)
    assert_close(pages, wide, 6e-2)
    near, far = ((ours.float() - one).norm() / one.norm() for one in (expected, exact))
    assert near < far, "nearer to the definition than to what is not rounded"
