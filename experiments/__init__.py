"""What measures: each module has a main(), and runs as `python -m experiments.NAME`."""
