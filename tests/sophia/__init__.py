"""Sophia: its equations are held against the reference in ``trajectories``; here, its estimates and who brings them."""
