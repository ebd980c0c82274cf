"""GGUF files: header, blocks of quantised numbers, llama.cpp's names of tensors and metadata, tokenizer."""
