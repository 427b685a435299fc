"""Where the optimizer's step runs: in graph or detached, chosen by what was measured of the machine."""
