"""Quantised activations as values of their own: ops that produce them, and the GEMMs that take them."""
