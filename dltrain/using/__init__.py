"""finding -> rows -> model -> results: what is done with a network once it is trained, on this machine or on many."""
