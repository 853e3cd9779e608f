"""What is odd in the rows, and what follows from it."""
