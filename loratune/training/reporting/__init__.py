"""What a run says of itself: on the screen, in files, to trackers."""
