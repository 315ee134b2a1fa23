"""The Light GRU on a CPU: a matrix product in registers, threads, the compiled loop, the backend."""
