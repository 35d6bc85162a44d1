"""Helpers of a process: devices, memory, precision, ranks of torchrun, signals, values, timing."""
