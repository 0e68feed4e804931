"""The paper's experiments at the scale of one machine: what is trained, what is measured, how it is shown."""
