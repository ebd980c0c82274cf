"""What benchmarks use: machine, work, cases, comparison with definitions."""
