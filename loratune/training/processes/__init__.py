"""Trains with several processes: starts them, connects them, and ends them where one is lost."""
