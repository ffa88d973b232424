"""Bad input gets a clear error: what was given, what was expected, what to do, in the user's own names."""
