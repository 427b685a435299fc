"""Loss spikes: detecting them, deciding what to do about them, and undoing the steps that led to them."""
