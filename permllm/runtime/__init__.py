"""What a process is: precision, memory, devices, several processes, signals, seeds, timing, its output."""
