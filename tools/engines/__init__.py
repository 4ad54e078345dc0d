"""What serving engines make of a quantized directory: converted for them, computed as they do."""
