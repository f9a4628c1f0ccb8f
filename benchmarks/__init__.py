"""What this project's numbers are and how they are taken: `python -m benchmarks --help`.

A suite declares cases: what is compared, on which inputs, and what it must move at least.
`runner.py` takes the time, `machine.py` knows the machine, `report.py` writes the figures down.
"""
