"""The machine: files, processes, devices, the console."""
