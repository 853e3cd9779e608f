"""What follows from the facts about a machine; nothing is measured here."""
