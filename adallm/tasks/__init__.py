"""Task files for lm-eval, and the Python that they name."""
