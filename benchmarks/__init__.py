"""`python -m benchmarks`: the product against the plain formulation, in one process, interleaved."""
