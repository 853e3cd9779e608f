"""The command line: parse, one lazy call, print."""
