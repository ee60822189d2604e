"""The measurements behind `evaluate.py`, a module each, and what they share (harness, report)."""
