"""What every op means, in plain PyTorch: the specification that all other backends are compared with."""
