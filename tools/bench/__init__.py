"""`python -m tools.bench`: the product against the plain formulation, in one process, interleaved."""
