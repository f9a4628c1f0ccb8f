"""How a GPU does each op, in Triton: a file an op, with the kernels and the functions that launch them.

Imported when a first call is served by Triton (bit_kernels/backends.py). With the environment
variable BIT_KERNELS_INTERPRET=1 the kernels run on tensors of the CPU, by Triton's interpreter.
"""
