"""Process: devices, memory, precision, ranks of torchrun, signals."""
