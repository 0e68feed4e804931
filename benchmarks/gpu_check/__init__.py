"""`make gpu-check`: everything that needs a GPU, in one command of nine minutes; see CONTRIBUTING.md.

Each stage is a module with ``run(check) -> result`` and runs in a process of its own. It is red when it raises; after a
red one nothing runs, and no speed is kept.
"""
