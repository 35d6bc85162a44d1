"""Methods that order input channels."""
