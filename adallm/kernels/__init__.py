"""Triton kernels, each with its launcher, and the table that chooses among them."""
