"""The Metal kernels as PTX on an NVIDIA GPU: building, launching, checking, timing, profiling.

``build`` needs the tool chain of tests/metal and ptxas; everything else a GPU, torch and cupy, but
no built torch_kvq. See benchmarks/ptx.py.
"""
