"""Fast steps of generation: compiled on the CPU, a CUDA graph on a GPU."""
