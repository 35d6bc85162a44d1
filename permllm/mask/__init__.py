"""Methods that choose masks."""
