"""Model directories: read, checked, and written."""
