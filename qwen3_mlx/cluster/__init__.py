"""Several machines: one leads the engine, the others compute their share of the network."""
