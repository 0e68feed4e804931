"""`make gpu-check` and `make gpu-bench`: what needs a GPU, in two commands of nine minutes each; see CONTRIBUTING.md.

Each stage is a module with ``run(check) -> result`` and runs in a process of its own. It is red when it raises; after a
red one nothing runs, and no speed is kept.
"""
