"""Which implementation of an operation runs, why, and the check that it is right."""
