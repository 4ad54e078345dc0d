"""What kvc8-verify does: forms side by side, passes held to their contracts."""
