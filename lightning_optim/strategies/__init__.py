"""Lightning strategies: where the step runs. None yet: the engines step inside any of Lightning's own."""
