"""What training and use cost: seconds, memory, multiplications, and how each grows."""
