"""After training: the adapter merged into its base or exported for other programs, and the proof of it."""
