"""A small quantized weight, whose last block is not full."""

import pytest
from random_tensors import normal

from qlora_kernels.nf4 import NF4Weight, quantize_nf4


@pytest.fixture
def weight() -> NF4Weight:
    return quantize_nf4(normal(7, 45) / 45**0.5)
