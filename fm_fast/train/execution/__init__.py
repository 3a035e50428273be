"""Where and how a step runs: devices, memory, processes, CUDA graphs, and when it may be interrupted."""
