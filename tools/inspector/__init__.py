"""What kvc8-inspect sees in a model directory, finds wrong with it, and prints."""
