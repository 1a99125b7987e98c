"""What was measured on the reference model, and the code that measures it again: `python -m benchmarks --help`."""
