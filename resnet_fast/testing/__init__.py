"""Shapes by network, cases by op and the error budget, shared by tests and benchmarks."""
