"""Parts of the benchmarks: machine limits, amount of work, cases, comparison with the definitions."""
