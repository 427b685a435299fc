"""Steps that ask for evaluations: the protocol, and who answers."""
