"""The d-sized half."""
