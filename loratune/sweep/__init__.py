"""Trains one recipe with many values of some settings, and says which is best and by how much."""
