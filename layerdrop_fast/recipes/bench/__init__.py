"""What other libraries do, restated so that both can be measured side by side."""
