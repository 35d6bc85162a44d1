"""The texts of this package: every module but `base` is one, and its name in the settings has hyphens for underscores."""
