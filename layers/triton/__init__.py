"""Triton kernels for a decoding step: a few rows of one token each.

Importing this package imports no triton; its modules do, so they are imported where a kernel is first called.
layers/kernels/one_token.py has the torch definition of each kernel and calls both. All sizes are compile-time
constants: a model has one set of them. Tensors are contiguous. Where a definition rounds to the model's dtype between
two steps, its kernel rounds there too, except where its docstring says otherwise.
"""
