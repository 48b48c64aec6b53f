"""Products in eight bits, as defined: what is lost, and what is left alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disagg.errors import ModelError
from disagg.model.fp8 import FP8, LARGEST, Fp8ReferenceOps, quantise
from disagg.model.load import load_model
from disagg.model.ops import ReferenceOps

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.floats(-20, 20))
def test_rounding_loses_a_sixteenth_of_a_number_at_most(seed: int, exponent: float) -> None:
    """e4m3 has three bits after the first, so half a step is a 16th; the smallest numbers are 2^-9 of 448 apart."""
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    found = quantise(rows)
    assert found.values.dtype == FP8
    largest = rows.abs().amax(1, keepdim=True)
    allowed = torch.maximum(rows.abs() / 16, largest * 2**-10 / LARGEST) * 1.001
    assert ((found.plain() - rows).abs() <= allowed).all()


@given(SEEDS)
def test_each_row_has_a_scale_of_its_own(seed: int) -> None:
    """A row's numbers do not depend on the other rows; one of zeros stays zeros."""
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1e-6, 1, 1e6, 0])[:, None]
    together = quantise(rows)
    for index, row in enumerate(rows):
        alone = quantise(row[None])
        assert torch.equal(alone.plain()[0], together.plain()[index])
    assert not together.plain()[3].any()


def test_a_product_is_near_the_plain_one_and_the_output_projection_is_the_plain_one() -> None:
    """Errors of both factors are independent and average out over the sum."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 512), torch.randn(48, 512), torch.randn(48)
    plain = ReferenceOps().linear(weight, bias)(x)
    rounded = Fp8ReferenceOps().linear(weight, bias)(x)
    error = (rounded - plain).norm() / plain.norm()
    assert 0.005 < error < 0.05
    assert torch.equal(Fp8ReferenceOps().linear(weight, bias, torch.float32)(x), plain)


def test_cores_refuse_it() -> None:
    """There it would be slower than float32: one sentence."""
    with pytest.raises(ModelError, match="dtype fp8 cannot be used on cpu"):
        load_model("seed", dtype="fp8")
