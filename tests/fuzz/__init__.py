"""Fuzzers: random cases from seeds, a sample of each in every run of the tests, thousands by ``make fuzz``."""
