"""How each quantization recipe chooses numbers."""
