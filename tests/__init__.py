"""Before any of the tests' modules is imported: kernels run in Triton's interpreter where there is no GPU, and Triton
must be told so before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
