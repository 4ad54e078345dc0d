"""A model directory as a program."""
