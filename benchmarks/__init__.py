"""Measurements: the GPU campaign, op microbenchmarks and the README's table."""
