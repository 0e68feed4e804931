"""What a training step costs by other libraries' rules, by ours, and at the limit, measured side by side."""
