"""Conversion between numbers of bytes and text."""

import re

UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{u}B": UNITS[u] for u in "KMGT"} | {f"{u}IB": 2 ** (10 * i) for i, u in enumerate("KMGT", start=1)}


def parse_bytes(size: str | int) -> int:
    """Bytes from "2GiB", "500MB" or a number. Raises: ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(size).strip())
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{size!r} is not a size: write it as 2GiB, 500MB or a number of bytes.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def binary(n: int) -> str:
    """Bytes in binary units: 24 KiB, 73.7 MiB, 6.07 GiB."""
    size, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
