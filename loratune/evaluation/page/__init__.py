"""eval.html: an evaluation as one page without scripts, fonts or anything from the network."""
