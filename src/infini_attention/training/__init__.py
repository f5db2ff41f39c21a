"""Training through the memory: gates that move, losses that fit, segments that repeat."""
