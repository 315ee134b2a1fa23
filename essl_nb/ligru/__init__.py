"""The Light GRU: equations, kernels and layers."""
