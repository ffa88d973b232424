"""A plan's analyses: what of `fkernel.analysis` is asked of a request and of U, and what is kept of the answers."""
