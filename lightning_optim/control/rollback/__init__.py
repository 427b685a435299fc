"""Loss spikes: noticing them, taking the steps back that led there, and what is decided about it."""
