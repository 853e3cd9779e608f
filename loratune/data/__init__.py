"""Turns files of conversations into token ids and labels."""
