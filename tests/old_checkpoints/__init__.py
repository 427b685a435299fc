"""Checkpoints of earlier versions go on in this one.

``python -m tests.old_checkpoints.make FOLDER`` writes those of the version that is imported. The files here are kept as
they were written: a later version adds its own, if it saves anything else.
"""
