"""The paper's experiments at the scale of one machine: which networks are trained, what is measured, how it is shown."""
