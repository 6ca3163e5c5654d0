"""The suite computes on tiny tensors: more than one torch thread only makes it wait for the others."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
