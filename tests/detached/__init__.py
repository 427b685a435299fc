"""Tests of detached steps."""
