"""Files and hub data sets as streams of rows, in little memory however large they are."""
