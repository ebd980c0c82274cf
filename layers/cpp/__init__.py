"""Kernels in C++ for CPUs, as operations on tensors that torch.compile can trace. Without gradients."""
