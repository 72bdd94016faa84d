"""What a network is like before it is exported: its layers, its size, what shifting changes."""
