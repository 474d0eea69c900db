"""Tests of Triton kernels in the interpreter: a process of their own, which test_triton_kernels.py starts.

TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_support import repair_bfloat16_in_the_interpreter

    repair_bfloat16_in_the_interpreter()
    np.seterr(over="ignore")  # an exponential that is infinite on a GPU is so here
else:
    collect_ignore_glob = ["test_*.py"]
