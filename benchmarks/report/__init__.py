"""Tables, plots and verdicts on the goals from the results of `make bench`, written into README.md and docs/.

python -m benchmarks.report benchmarks/results/cpu-2core
"""
