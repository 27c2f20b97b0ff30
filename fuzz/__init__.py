"""Fuzzing: see README.rst."""
