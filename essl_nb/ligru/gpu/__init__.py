"""The Light GRU on an NVIDIA GPU: PTX, the persistent kernel, one graph of launches, the backend."""
