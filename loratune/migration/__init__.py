"""Translates the configs of other training tools into recipes, and compares how both render rows."""
