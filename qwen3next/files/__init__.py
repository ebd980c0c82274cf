"""Files on disk: atomic writes, checksums, partial reads of safetensors."""
