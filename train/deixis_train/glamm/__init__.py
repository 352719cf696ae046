"""Training of GLaMM: what an item of each data set becomes, how sets are mixed, and what is minimised."""
