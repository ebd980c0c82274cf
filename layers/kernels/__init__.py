"""Fast implementations of the layers' operations: C++ on the CPU, Triton and flash-attn on CUDA, torch in parts."""
