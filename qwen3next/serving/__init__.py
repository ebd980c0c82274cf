"""A server: many requests on one machine, each answered as if it were alone."""
