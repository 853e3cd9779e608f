"""The command line: each command parses its flags, makes one call, and prints the result."""
