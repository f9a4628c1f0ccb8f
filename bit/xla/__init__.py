"""Big Transfer on XLA: the network in flax, the training step, and the engine of `bit.train`.

models.py    the network, on bit_kernels.xla
weights.py   its parameters, from and to the PyTorch network and so every file format
step.py      one update over a mesh of devices, and the forward pass of an evaluation
train.py     `python -m bit.train ... --engine xla`
topology.py  TPUs that are described and not there, and what is compiled for them
program.py   what a compiled program says of itself: cycles, memory, sums over devices
plan.py      `python -m bit.plan --topology ...`
"""
