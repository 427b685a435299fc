"""The command line: ``lightning-optim fit | validate | test | predict | list | doctor | plan``."""
