"""A plan's analyses: `fkernel.analysis` applied to requests and to U."""
