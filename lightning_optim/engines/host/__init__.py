"""The host engine: Programs printed as C, compiled by the system's compiler, called through ctypes."""
