"""Models on disk: Hugging Face checkpoints and packed stores.

backends                what lies at a path, opened: a packed store, or a checkpoint read in place
checkpoint              a checkpoint's tensors, as the model has them
weight_files            which files hold them, and in which dtype the model computes
conversion              how tensors on disk become parameters
expert_tensors          which tensors, and which rows of them, hold an expert
published_quantisation  whether the weights were published quantised, and what makes them plain
published_experts       the format of experts that were, and their parts
own_dequantiser         makes formats plain that transformers does not
ragged_blocks           FP8 whose last blocks are smaller than the others
pack                    from a checkpoint to a store
synth                   a checkpoint or a store of random weights, for measurements
named_models            which models `synth` knows, and their configurations
random_weights          the values that it writes
"""
