"""Writes models as GGUF files.

writer         a source of weights as one file, or as the parts of a split one
quantisation   which tensor gets which of ggml's types, and its values in it
vocabulary     a token for each byte, so that a server can talk
architecture   how transformers' settings and tensors are called and laid out there
architectures  what the families have of their own in this, one file each
"""
