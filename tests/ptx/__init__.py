"""A machine for PTX, NVIDIA's assembly: it runs what Triton compiles kernels to, on the CPU, thread by thread in lockstep."""
