"""Changes of weights that keep the float model and make it easier to quantize."""
