"""The suite computes on tiny tensors: more than one torch thread only makes it wait for the others."""

import torch

torch.set_num_threads(1)
