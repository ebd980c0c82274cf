"""Quantised weights of a checkpoint folder: one file a format, and `find` that tells which tensors make which weight.

`find` returns an ordinary-looking entry for each weight: name, logical shape, bytes, `read`. Reading dequantises in
fp32; nothing is dequantised before it is read. What is quantised is decided by the tensors, never by an ignore list.
"""
