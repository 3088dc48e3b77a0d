"""Weights that the package ships, each beside a record of its sha256, training and accuracy."""
