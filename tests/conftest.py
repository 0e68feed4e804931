"""One thread for all tests: their tensors are small, and threads that wait for a shared core cost seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; processes that tests start inherit it

import torch

torch.set_num_threads(1)
