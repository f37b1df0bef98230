"""Inner loops, compiled: plain arrays in and out, nothing known of layers or models."""
