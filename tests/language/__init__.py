"""What rules can say, and that every engine that can run it comes to the same."""
