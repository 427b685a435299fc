"""Framework-neutral training control; Lightning and Accelerate adapters live in their own packages."""
