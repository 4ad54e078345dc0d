"""What a program is: ops, types, text form, verification, checkpoints and capture."""
