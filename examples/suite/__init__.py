"""The parts of `examples/compare.py`: tasks, methods, jobs, choices, tables and pictures."""
