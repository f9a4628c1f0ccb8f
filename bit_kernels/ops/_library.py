"""The namespace torch.ops.bit_kernels; each op's file defines its own schema in it."""

import torch

library = torch.library.Library("bit_kernels", "DEF")
