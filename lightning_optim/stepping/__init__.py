"""One step: which parameters go to which engine, with which tensors and numbers, and what is checked of them."""
