"""Tensors and floats only: no settings, devices, ranks or files."""
