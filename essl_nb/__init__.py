"""What can stand in for self-attention in a self-supervised speech encoder, and what it costs."""
__version__ = "0.1.0"
