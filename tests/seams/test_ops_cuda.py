"""The seam `Ops`: CudaOps computes what ReferenceOps defines.

With a CUDA device the kernels run there, in every dtype. Without one they run as Python on the CPU where Triton is
installed, in float32 and float16, on small shapes. The reference is float32 on the same rounded inputs; the bound is
on |ours - expected| / |expected| (Euclidean norms): one rounding of the result and, in narrow dtypes, of what goes
into each product. Outputs that kernels write in place are poisoned with NaN before.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from ops_cuda_data import BOUNDS, DEVICE, ON_GPU, assert_close, draw, make_layer, on_device, rope_on_device, widened
from ops_data import MIXED, make_step
from torch import Tensor

from disagg.model.ops import ReferenceOps, compose_decoder

pytest.importorskip("triton")

from disagg.model.ops_cuda import CudaOps
from disagg.model.ops_cuda_decode import Fused, attend_decodes
from disagg.model.ops_cuda_linear import Extras, small_product

# Triton 3.6's interpreter relies on something numpy deprecated, and removed in 2.4
pytestmark = [pytest.mark.gpu] if ON_GPU else [pytest.mark.filterwarnings("ignore:Conversion of an array")]
if not ON_GPU and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)
REFERENCE = ReferenceOps()
STACK = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# a kernel takes a second or more to compile on a GPU for each dtype, head size and page size: few of each
DTYPES = [torch.bfloat16, torch.float32] if ON_GPU else [torch.float32, torch.float16]
HEADS = [(8, 2, 128), (9, 3, 64), (4, 2, 16), (14, 2, 80)] if ON_GPU else [(6, 2, 16), (3, 1, 24)]
DECODES = [(1, n) for n in (1, 2, 63, 64, 65, 130, 200)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 50] if ON_GPU else [1, 7, 20])
def test_small_product_with_every_extra(rows: int, dtype: torch.dtype) -> None:
    """Norm, bias, residual and gate, none and all together, for sizes that fill no tile and for those that do."""
    for outputs, inputs in ((33, 48), (1000, 4096)) if ON_GPU else ((33, 48), (64, 128)):
        x, residual = draw(rows, inputs, dtype=dtype, scale=3), draw(rows, outputs, dtype=dtype)
        norm = draw(inputs, dtype=dtype)
        for gated in (False, True):
            shape = (2 * outputs if gated else outputs, inputs)
            weight, bias = draw(*shape, dtype=dtype, scale=inputs**-0.5), draw(shape[0], dtype=dtype)
            for extras, out_dtype in (
                (Extras(gated=gated), torch.float32),
                (Extras(norm, 1e-6, bias, residual, gated), dtype),
            ):
                ours = small_product(x, weight, extras, out_dtype)
                assert ours.dtype == out_dtype
                assert_close(ours, _expected_product(x, weight, extras), BOUNDS[dtype])


def _expected_product(x: Tensor, weight: Tensor, extras: Extras) -> Tensor:
    value = x.float()
    if extras.norm is not None:
        value, _ = REFERENCE.add_rms_norm(value, None, extras.norm.float(), extras.eps)
    value = REFERENCE.linear(weight.float(), None if extras.bias is None else extras.bias.float())(value)
    value = REFERENCE.silu_mul(value) if extras.gated else value
    return value if extras.residual is None else value + extras.residual.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("width", [576, 20])
def test_norm_and_silu(rows: int, width: int, dtype: torch.dtype) -> None:
    """add_rms_norm returns the norm of the sum and the sum itself; silu_mul is silu of one half times the other."""
    ops, x, weight = CudaOps(dtype), draw(rows, 2 * width, dtype=dtype, scale=8), draw(2 * width, dtype=dtype)
    for residual in (None, draw(rows, 2 * width, dtype=dtype)):
        ours = ops.add_rms_norm(x, residual, weight, 1e-5)
        wide = None if residual is None else residual.float()
        expected = REFERENCE.add_rms_norm(x.float(), wide, weight.float(), 1e-5)
        for mine, right in zip(ours, expected, strict=True):
            assert_close(mine, right, BOUNDS[dtype])
    assert_close(ops.silu_mul(x), REFERENCE.silu_mul(x.float()), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rotary", "norms"), [(True, True), (False, False), (True, False)])
def test_rotate_and_store(heads: tuple[int, int, int], rotary: bool, norms: bool, dtype: torch.dtype) -> None:
    """q comes back normed and rotated, k and v are in their slots, and no other number of the pages changed."""
    num_heads, num_kv, size = heads
    step, num_pages = make_step(MIXED, 16)
    step.slots[3] = -1  # written nowhere
    step = on_device(step)
    qkv = draw(len(step.tokens), (num_heads + 2 * num_kv) * size, dtype=dtype)
    rope = rope_on_device(size) if rotary else None
    weights = [draw(size, dtype=dtype) for _ in range(2)] if norms else [None, None]
    pages = draw(num_pages, 2, 2, num_kv, 16, size, dtype=dtype)
    written = pages.clone()
    q = CudaOps(dtype).rotate_and_store(qkv, step, 1, written, rope, *weights, 1e-6)
    expected = pages.to(torch.float32, copy=True)
    kept = step.slots >= 0
    known = replace(step, slots=step.slots[kept], positions=step.positions[kept])
    wide = [None if weight is None else weight.float() for weight in weights]
    REFERENCE.rotate_and_store(qkv[kept].float(), known, 1, expected, rope, *wide, 1e-6)
    spare = torch.zeros(1, 2, 2, num_kv, len(step.tokens), size, device=DEVICE)
    anywhere = replace(step, slots=torch.arange(len(step.tokens), device=DEVICE))
    assert_close(q, REFERENCE.rotate_and_store(qkv.float(), anywhere, 1, spare, rope, *wide, 1e-6), BOUNDS[dtype])
    assert_close(written, expected, BOUNDS[dtype])
    same = expected == pages.float()
    assert torch.equal(written[same], pages[same])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the bad request, interpreted
@pytest.mark.parametrize("sequences", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_values_in_pages_are_finite(sequences: list[tuple[int, int]]) -> None:
    """What is no number in one request reaches no page, where the next owner would read it with weight 0."""
    num_heads, num_kv, size = HEADS[0]
    dtype, kv_row = DTYPES[-1], (num_heads + num_kv) * size
    step, num_pages = make_step(sequences, 16)
    step = replace(on_device(step), max_query_len=max(new for new, _ in sequences))
    qkv, pages = (draw(*shape, dtype=dtype) for shape in ((len(step.tokens), kv_row + num_kv * size),
                                                          (num_pages, 1, 2, num_kv, 16, size)))  # fmt: skip
    for row, bad in enumerate((float("inf"), float("-inf"), float("nan"))):
        qkv[row, kv_row + 3] = bad
    if step.max_query_len == 1:
        out = torch.empty(len(qkv), num_heads * size, device=DEVICE, dtype=dtype)
        attend_decodes(qkv, 0, pages, step, 0.1, out, len(sequences), Fused(None, None, None, 0.0))
    else:
        CudaOps(dtype).rotate_and_store(qkv, step, 0, pages, None, None, None, 0.0)
    assert pages.isfinite().all()
    slots = step.slots[:3]
    assert (pages[slots // 16, 0, 1, 0, slots % 16, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "page_size"), [(heads, 20 if heads[0] % 2 else 16) for heads in HEADS])
@pytest.mark.parametrize("sequences", [MIXED, DECODES, [(150, 150)]], ids=["mixed", "decodes", "prompt"])
def test_attend(
    heads: tuple[int, int, int], page_size: int, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Causal attention over shuffled pages, for decodes, chunks and both, whatever the host says of the step."""
    num_heads, num_kv, size = heads
    step, num_pages = make_step(sequences, page_size)
    step = on_device(step)
    pages = draw(num_pages, 2, 2, num_kv, page_size, size, dtype=dtype)
    q = draw(len(step.tokens), num_heads, size, dtype=dtype)
    expected = REFERENCE.attend(q.float(), 1, pages.float(), step, size**-0.5)
    known = [replace(step, max_query_len=1, max_context_len=4096)] if sequences is DECODES else []
    for said in (step, replace(step, num_decodes=1 if sequences[0][0] == 1 else 0), *known):
        assert_close(CudaOps(dtype).attend(q, 1, pages, said, size**-0.5), expected, BOUNDS[dtype])


def test_attention_finds_each_tile_of_hundreds_of_sequences() -> None:
    """More sequences than a program looks at together, some without rows."""
    sequences = [(1 + index % 3, 3 + index % 5) for index in range(300 if ON_GPU else 258)]
    step, num_pages = make_step(sequences, 16)
    step = on_device(step)
    pages, q = draw(num_pages, 1, 2, 1, 16, 16, dtype=torch.float32), draw(len(step.tokens), 1, 16, dtype=torch.float32)
    expected = REFERENCE.attend(q, 0, pages, step, 0.25)
    assert_close(CudaOps(torch.float32).attend(q, 0, pages, step, 0.25), expected, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False], ids=["all extras", "llama"])
@pytest.mark.parametrize("sequences", [MIXED, DECODES, [(1, 40)]], ids=["mixed", "decodes", "one"])
def test_decoder_is_what_compose_decoder_defines(
    sequences: list[tuple[int, int]], extras: bool, dtype: torch.dtype
) -> None:
    """Three layers, by one call and by single operations, equal the reference; so do the pages."""
    heads, hidden, width = ((8, 2, 64), 512, 768) if ON_GPU else ((4, 2, 32), 96, 160)
    layers, rope = [make_layer(hidden, heads, width, extras, dtype) for _ in range(3)], rope_on_device(heads[2])
    step, num_pages = make_step(sequences, 16)
    host = {} if sequences is MIXED else {"max_query_len": 1, "max_context_len": 4096}
    step = on_device(step, **host)
    x, pages = draw(len(step.tokens), hidden, dtype=dtype), draw(num_pages, 3, 2, heads[1], 16, heads[2], dtype=dtype)
    pages_expected = pages.to(torch.float32, copy=True)
    expected = REFERENCE.decoder([widened(layer) for layer in layers], rope, 1e-5)(x.float(), step, pages_expected)
    ops = CudaOps(dtype)
    for decoder in (ops.decoder(layers, rope, 1e-5), compose_decoder(ops, layers, rope, 1e-5)):
        written, before = pages.clone(), x.clone()
        assert_close(decoder(x, step, written), expected, STACK[dtype])
        assert_close(written, pages_expected, STACK[dtype])
        assert torch.equal(x, before)


def test_rows_of_padding_write_nothing_and_disturb_nobody() -> None:
    """A batch padded with rows of context 0 and slot -1: the others' results and all pages are the same bits."""
    dtype = torch.float16
    layers, rope = [make_layer(96, (4, 2, 32), 160, True, dtype) for _ in range(2)], rope_on_device(32)
    step, num_pages = make_step([(1, n) for n in (5, 70, 33, 1, 9)], 16)
    step = on_device(step, max_query_len=1, max_context_len=256)
    x, pages = draw(8, 96, dtype=dtype), draw(num_pages, 2, 2, 2, 16, 32, dtype=dtype)

    def padded(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((3, *tensor.shape[1:]), value)])

    wider = replace(
        step, tokens=padded(step.tokens, 0), positions=padded(step.positions, 0), slots=padded(step.slots, -1),
        context_len=padded(step.context_len, 0), page_table=padded(step.page_table, 0),
        query_start=torch.arange(9, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    decoder = CudaOps(dtype).decoder(layers, rope, 1e-5)
    written, alone = pages.clone(), pages.clone()
    ours = decoder(x, wider, written)
    assert torch.equal(ours[:5], decoder(x[:5], step, alone))
    assert torch.isfinite(ours).all()
    assert torch.equal(written, alone)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_captured_step_computes_what_its_tensors_hold_when_it_is_replayed(batch: int) -> None:
    """Nothing of a step is frozen in a CUDA graph but its shapes: other contexts and pages give the eager result."""
    dtype, layers_count = torch.bfloat16, 2
    layers = [make_layer(512, (8, 2, 64), 768, True, dtype) for _ in range(layers_count)]
    decoder = CudaOps(dtype).decoder(layers, rope_on_device(64), 1e-5)
    steps = []
    for _ in range(2):
        lengths = torch.randint(1, 250, (batch,)).tolist()
        step, _ = make_step([(1, 255 if index == 0 else n) for index, n in enumerate(lengths)], 16)
        steps.append(on_device(step, max_query_len=1, max_context_len=256))
    x, pages = draw(batch, 512, dtype=dtype), draw(16 * batch, layers_count, 2, 2, 16, 64, dtype=dtype)
    held = replace(steps[0], **{name: v.clone() for name, v in vars(steps[0]).items() if isinstance(v, Tensor)})
    decoder(x, held, pages.clone())
    graph, written = torch.cuda.CUDAGraph(), pages.clone()
    with torch.cuda.graph(graph):
        out = decoder(x, held, written)
    for step in (steps[1], steps[0]):
        for name, value in vars(step).items():
            if isinstance(value, Tensor):
                getattr(held, name).copy_(value)
        written.copy_(pages)
        out.fill_(float("nan"))
        graph.replay()
        alone = pages.clone()
        assert torch.equal(out, decoder(x, step, alone))
        assert torch.equal(written, alone)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_the_same_step_gives_the_same_bits() -> None:
    """No result depends on which program finishes first: fifty runs of a long context in many parts are equal."""
    dtype = torch.bfloat16
    step, num_pages = make_step([(1, 200)] * 3, 16)
    step = on_device(step, max_query_len=1, max_context_len=4096)
    pages, q = draw(num_pages, 1, 2, 2, 16, 128, dtype=dtype), draw(3, 8, 128, dtype=dtype)
    ops = CudaOps(dtype)
    first = ops.attend(q, 0, pages, step, 0.1)
    for _ in range(50):
        assert torch.equal(ops.attend(q, 0, pages, step, 0.1), first)
