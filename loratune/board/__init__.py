"""Lists, compares and shows what training and the commands after it have left in folders; nothing is changed."""
