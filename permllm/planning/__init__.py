"""Memory, minutes and placement of a job, before it loads weights."""
